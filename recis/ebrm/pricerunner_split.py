"""Offers of a PriceRunner file, and their split into train, dev and test by groups of clusters.

Two clusters belong to one group when they share a normalised title or a variant key (the label less colour, quantities,
"dual sim", "integrated", tray / box), so that no product is trained on in one colour and tested in another. A title that
occurs in 4 clusters or more says nothing of its product ("frost free fridge freezer"): it joins no groups, and its offers
are in no pair.

    group = smallest cluster id of the union;  u = int(sha256("pr-relevance-v1:<group>")[:8], 16) / 2**32
    train u < .70, dev u < .85, else test
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recis.ebrm.pricerunner_text import COLOURS, normalise
from recis.errors import DataError

VERSION = "pr-relevance-v1"
PARTS = ("train", "dev", "test")
COLUMNS = ("product_id", "product_title", "cluster_id", "cluster_label", "category_label")
GENERIC_CLUSTERS = 4
_QUANTITY = re.compile(r"\b\d+(\.\d+)?(-\d+(\.\d+)?)?\s*(gb|tb|mb|ghz|mhz|mm|inch|kg|cm|l)\b")
_VARIANT = re.compile(r"\b(dual sim|integrated|upgrade|tray|box)\b")
_COLOUR_WORDS = frozenset(word for colour in COLOURS for word in colour.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One merchant's offer; the title is normalised."""

    product_id: int
    title: str
    cluster_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The offers of a file in its order, and the clusters they are put in."""

    offers: tuple[Offer, ...]
    labels: Mapping[int, str]
    """Cluster id -> normalised label."""
    categories: Mapping[int, str]
    """Cluster id -> category as the file writes it."""

    def titles_of(self) -> dict[int, list[str]]:
        """Return cluster id -> titles of its offers."""
        titles: dict[int, list[str]] = {cluster: [] for cluster in self.labels}
        for offer in self.offers:
            titles[offer.cluster_id].append(offer.title)
        return titles

    def generic_titles(self) -> frozenset[str]:
        """Return the titles that occur in 4 clusters or more."""
        clusters: dict[str, set[int]] = defaultdict(set)
        for offer in self.offers:
            clusters[offer.title].add(offer.cluster_id)
        return frozenset(title for title, found in clusters.items() if len(found) >= GENERIC_CLUSTERS)


def read_catalogue(path: str | Path) -> Catalogue:
    """Return the offers of a Parquet file with the columns of COLUMNS; others are not read.

    Raises:
        DataError: the file cannot be read, has no rows or lacks a column; a null; a product id that occurs twice; a cluster
            with two labels or two categories.
    """
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a readable Parquet file: {error}", file=str(path)) from error
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise DataError(f"the column is missing; needed are {', '.join(COLUMNS)}", file=str(path), column=missing[0])
    table = pq.read_table(path, columns=list(COLUMNS))
    if table.num_rows == 0:
        raise DataError("the file has no rows", file=str(path))
    for name in COLUMNS:
        if table[name].null_count:
            raise DataError("a null; every offer needs a value here", file=str(path), column=name)
    columns = [table[name].to_pylist() for name in COLUMNS]
    return _catalogue(zip(*columns, strict=True), str(path))


def _catalogue(rows: Iterable[tuple[int, str, int, str, str]], file: str) -> Catalogue:
    offers: dict[int, Offer] = {}
    labels: dict[int, str] = {}
    categories: dict[int, str] = {}
    for row, (product_id, title, cluster_id, label, category) in enumerate(rows):
        if product_id in offers:
            raise DataError("the product id occurs twice", file=file, row=row, column="product_id", value=product_id)
        for column, known, value in (
            ("cluster_label", labels, normalise(label)),
            ("category_label", categories, category),
        ):
            if known.setdefault(cluster_id, value) != value:
                first = f"cluster {cluster_id} had {known[cluster_id]!r} in an earlier row"
                raise DataError(first, file=file, row=row, column=column, value=value)
        offers[product_id] = Offer(product_id=product_id, title=normalise(title), cluster_id=cluster_id)
    return Catalogue(offers=tuple(offers.values()), labels=labels, categories=categories)


def variant_key(label: str) -> str:
    """Return a normalised label less colours, quantities, "dual sim", "integrated" and tray / box."""
    rest = _VARIANT.sub(" ", _QUANTITY.sub(" ", label))
    return " ".join(word for word in rest.split() if word not in _COLOUR_WORDS and word != "+")


def groups(catalogue: Catalogue) -> dict[int, int]:
    """Return cluster id -> group: the smallest cluster id among those that are joined, directly or through others."""
    parent = {cluster: cluster for cluster in catalogue.labels}

    def root(cluster: int) -> int:
        while parent[cluster] != cluster:
            parent[cluster] = parent[parent[cluster]]
            cluster = parent[cluster]
        return cluster

    generic = catalogue.generic_titles()
    shared: dict[tuple[str, str], int] = {}
    keys = [(("label", variant_key(label)), cluster) for cluster, label in catalogue.labels.items()]
    keys += [(("title", offer.title), offer.cluster_id) for offer in catalogue.offers if offer.title not in generic]
    for key, cluster in keys:
        one, other = root(shared.setdefault(key, cluster)), root(cluster)
        parent[max(one, other)] = min(one, other)
    return {cluster: root(cluster) for cluster in parent}


def part_of_group(group: int) -> str:
    """Return "train", "dev" or "test"."""
    u = int(hashlib.sha256(f"{VERSION}:{group}".encode()).hexdigest()[:8], 16) / 2**32
    return "train" if u < 0.70 else "dev" if u < 0.85 else "test"


def parts(group_of: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """Return part -> its cluster ids, ascending."""
    found: dict[str, list[int]] = {part: [] for part in PARTS}
    for cluster in sorted(group_of):
        found[part_of_group(group_of[cluster])].append(cluster)
    return {part: tuple(clusters) for part, clusters in found.items()}


def offers_of(catalogue: Catalogue, clusters: Sequence[int]) -> tuple[int, ...]:
    """Return the positions in `catalogue.offers` of the offers of some clusters."""
    wanted = set(clusters)
    return tuple(position for position, offer in enumerate(catalogue.offers) if offer.cluster_id in wanted)
