"""Product records of three sources in one form: a title, and what is known of the product by attribute.

    generated     recis.ebrm.synthetic: canonical values, hidden ones included; the title spells them in its own ways
    OA-Mine       titles of Amazon offers with marked spans; the values are the spans
    PriceRunner   offer titles with a category; no other attribute

Records are cut into train and test by a hash of the id, OA-Mine by its own split; the decoder never sees a test title.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from recis.ebrm.canonical import canonical_text
from recis.ebrm.synthetic import SyntheticData
from recis.errors import ConfigError

CATEGORY = "category"
TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A product."""

    id: str
    source: str
    """generated, oa_mine or pricerunner."""
    title: str
    category: str
    attributes: Mapping[str, tuple[str, ...]]
    """By name, lower case, without the category."""
    spellings: Mapping[str, str]
    """Other spelling -> value, of the attributes' values, canonical text on both sides."""
    is_test: bool

    def normalised(self, value: str) -> str:
        """Return a value's canonical text, spellings replaced by the value they stand for."""
        text = canonical_text(value)
        return self.spellings.get(text, text)


def generated_records(data: SyntheticData) -> list[Record]:
    """Return a record per item of a generated catalogue."""
    spellings = {
        canonical_text(other): canonical_text(value)
        for kind in data.schema.types
        for other, value in kind.synonyms.items()
    }
    return [
        Record(
            id=item.id,
            source="generated",
            title=item.title.lower(),
            category=values[CATEGORY][0],
            attributes={kind: own for kind, own in values.items() if kind != CATEGORY},
            spellings=spellings,
            is_test=falls_in_test(item.id),
        )
        for item, values in zip(data.items, data.values, strict=True)
    ]


def oa_mine_records(path: Path) -> list[Record]:
    """Return the records of OA-Mine's titles.parquet.

    Raises:
        ConfigError: the file has other columns.
    """
    table = _table(path, ("split", "category", "title", "attributes"))
    records = []
    for number, row in enumerate(table):
        attributes: dict[str, tuple[str, ...]] = {}
        for entry in row["attributes"]:
            name = entry["attribute"].lower()
            attributes[name] = (*attributes.get(name, ()), entry["value"].lower())
        records.append(
            Record(
                id=f"oa{number}",
                source="oa_mine",
                title=row["title"].lower(),
                category=row["category"].lower(),
                attributes=attributes,
                spellings={},
                is_test=row["split"] == "test",
            )
        )
    return records


def pricerunner_records(path: Path, *, most: int) -> list[Record]:
    """Return the first `most` offers, by a hash of their ids, of PriceRunner's offers.parquet. Raises ConfigError as above."""
    table = _table(path, ("product_id", "product_title", "category_label"))
    chosen = sorted(table, key=lambda row: _share(f"pr{row['product_id']}", "order"))[:most]
    return [
        Record(
            id=f"pr{row['product_id']}",
            source="pricerunner",
            title=row["product_title"].lower(),
            category=row["category_label"].lower(),
            attributes={},
            spellings={},
            is_test=falls_in_test(f"pr{row['product_id']}"),
        )
        for row in chosen
    ]


def falls_in_test(name: str) -> bool:
    """Return whether a record of this id is in the test part, one in five."""
    return _share(name, "part") < TEST_SHARE


def attribute_names(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """Return the attributes that records of each source have, frequent ones first."""
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        own = counts.setdefault(record.source, {})
        for name in record.attributes:
            own[name] = own.get(name, 0) + 1
    return {source: tuple(sorted(own, key=lambda name: (-own[name], name))) for source, own in counts.items()}


def _share(name: str, salt: str) -> float:
    return int(hashlib.sha256(f"{salt}:{name}".encode()).hexdigest()[:8], 16) / 2**32


def _table(path: Path, columns: tuple[str, ...]) -> list[dict]:
    names = pq.read_schema(path).names
    missing = [name for name in columns if name not in names]
    if missing:
        raise ConfigError(f"{path}: has no column {missing[0]!r}; it has {', '.join(names)}")
    return pq.read_table(path, columns=list(columns)).to_pylist()
