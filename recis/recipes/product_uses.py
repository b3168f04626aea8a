"""What a decoder that understands products is good for: values that EBRM lacks, and an item tower under a ranker.

    EBRM       items of the test part with the values their records list, and with those the decoder read from the title put
               where a type lists none, at the decoder's confidence. The verdicts on (query, entity) are the gold ones, so the
               difference is that of the entities: ROC-AUC against the gold of all values, hidden ones included.
    ranker     DeepFM on clicks: words of the query, the item's id and position; with and without the decoder's pooled states
               of the title as a tower. Items of the test part have no click in its training: AUC on them is that of new items.

Confidence of a value = exp(mean log-probability of its tokens) while it was written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.ebrm import EBRM, EBRMConfig, Entity, Item, QEScorer
from recis.ebrm.canonical import canonical_text
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.synthetic import SyntheticData
from recis.embedding import AfterSightings, Feature, Normal, TableConfig
from recis.errors import ConfigError
from recis.features import FeatureSpec, Hash
from recis.io import DataConfig, Dense, Ids, Label, Strings
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam
from recis.recipes.product_records import falls_in_test
from recis.towers import ByPart, EmbeddingTowerConfig, TextTowerConfig, WithTowers, precompute
from recis.trainer import DenseAdamW, TrainConfig, Trainer

CERTAIN = 6.0  # logit of a gold verdict
WIDTH = 32
EPOCHS = 4


# ---- values for EBRM


@dataclass(frozen=True, slots=True)
class ReadValue:
    """A value that the decoder read: of which type, and how sure it was, in (0, 1]."""

    type: str
    value: str
    conf: float


def filled_in(data: SyntheticData, item: Item, read: Sequence[ReadValue]) -> Item:
    """Return an item with what was read of types that its record lists no value of; unknown types are left out."""
    listed = {entity.type for entity in item.entities}
    new: dict[str, Entity] = {}
    for value in read:
        if value.type in data.schema.names and value.type not in listed:
            entity = data.schema.entity(value.type, value.value, source="tagger", conf=value.conf)
            if entity.id not in new or entity.conf > new[entity.id].conf:
                new[entity.id] = entity
    return replace(item, entities=(*item.entities, *new.values()))


def ebrm_lines(data: SyntheticData, read: Mapping[int, Sequence[ReadValue]]) -> list[str]:
    """Return the table of EBRM with and without what was read; `read` has an entry per item number of the test part."""
    both = {"listed values": list(data.items), "+ values read from titles": list(data.items)}
    for number, values in read.items():
        both["+ values read from titles"][number] = filled_in(data, data.items[number], values)
    hidden = {
        number
        for number in read
        if any(kind not in {e.type for e in data.items[number].entities} for kind in data.values[number])
    }
    added = [
        (number, entity)
        for number in read
        for entity in both["+ values read from titles"][number].entities[len(data.items[number].entities) :]
    ]
    right = sum(
        entity.value in map(canonical_text, data.values[number].get(entity.type, ())) for number, entity in added
    )
    lines = [
        f"EBRM on {len(read):,} items of the test part, of which {len(hidden):,} list no value of a type they have; "
        f"{len(added):,} values read for types without one, {right:,} of them right",
        f"  {'':<30}{'ROC-AUC, all pairs':>20}{'items that hide a value':>26}",
    ]
    for name, items in both.items():
        values = [_ebrm_auc(data, items, chosen) for chosen in (set(read), hidden)]
        lines.append(f"  {name:<30}{values[0]:>20.4f}{values[1]:>26.4f}")
    return lines


def _ebrm_auc(data: SyntheticData, items: Sequence[Item], chosen: set[int]) -> float:
    """Return the ROC-AUC of EBRM over the graded pairs of some items."""
    scores, labels = [], []
    for query in range(len(data.queries)):
        own = [int(item) for item in data.pair_item[data.pair_query == query] if int(item) in chosen]
        if not own:
            continue
        candidates = [items[item] for item in own]
        text = data.queries[query].text
        known = [e for item in candidates for e in item.entities] + [data.schema.none(t) for t in data.schema.names]
        verdicts = {entity.id: CERTAIN * (2 * data.gold_qe(query, entity) - 1) for entity in known}
        scorer = QEScorer.table({(canonical_text(text), entity): logit for entity, logit in verdicts.items()})
        model = EBRM(EBRMConfig(schema=data.schema), scorer).eval()
        scores.append(model.score(text, candidates).log_r)
        labels += [data.gold_qi(query, item) for item in own]
    return roc_auc(np.concatenate(scores), np.array(labels)) if scores else math.nan


# ---- an item tower


def ranker_lines(data: SyntheticData, decoder: Path, out: Path, *, seed: int) -> list[str]:
    """Train the ranker without and with the decoder's pooled states and return the table of AUCs.

    Args:
        data: its click log is cut by item: those of the test part are only evaluated on.
        decoder: folder of the trained decoder and its tokenizer.
        out: where files and runs are kept.
        seed: of both runs.
    """
    if len(data.clicks.query) == 0:
        raise ConfigError("the generated data has no clicks; set num_impressions above 0")
    files = write_impressions(data, out / "impressions")
    text = TextTowerConfig(name="title", column="item", path=str(decoder), max_tokens=64).build().eval()
    titles = [item.title.lower() for item in data.items]
    precompute(text, np.arange(len(titles)), titles, out / "states")
    tower = EmbeddingTowerConfig(name="title", column="item", path=str(out / "states"), out_width=WIDTH, seed=seed)
    lines = [f"ranker on clicks{'':<16}{'AUC, items seen':>18}{'AUC, new items':>18}"]
    for name, towers in (("ids alone", ()), ("+ item tower", (tower,))):
        config = ranker_config(files["train"], towers, seed=seed)
        folder = out / name.strip("+ ").replace(" ", "-")
        trainer = Trainer(config, folder, resume=folder.exists(), quiet=True)
        trainer.train()
        cells = [trainer.evaluate(data_of(files[part]))["auc"] for part in ("seen", "new")]
        lines.append(f"  {name:<30}{cells[0]:>18.4f}{cells[1]:>18.4f}")
    return lines


def write_impressions(data: SyntheticData, folder: Path) -> dict[str, Path]:
    """Write the click log as Parquet: `train` and `seen` (a tenth) of items of the train part, `new` of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    is_new = np.array([falls_in_test(item.id) for item in data.items])[data.clicks.item]
    held = np.arange(len(is_new)) % 10 == 9
    table = pa.table(
        {
            "item": data.clicks.item.astype(np.int64),
            "words": [
                query.split() for query in np.array([q.text for q in data.queries], dtype=object)[data.clicks.query]
            ],
            "position": data.clicks.position.astype(np.float32),
            "click": data.clicks.clicked.astype(np.int8),
        }
    )
    files = {}
    for name, rows in (("train", ~is_new & ~held), ("seen", ~is_new & held), ("new", is_new)):
        files[name] = folder / f"{name}.parquet"
        pq.write_table(table.filter(pa.array(rows)), files[name], row_group_size=4096)
    return files


def data_of(path: Path) -> DataConfig:
    """Return how a file of impressions is read, in order."""
    return DataConfig(
        paths=(str(path),),
        format="parquet",
        columns=(Ids("item"), Strings("words", depth=1), Dense("position"), Label("click")),
        batch_size=512,
        num_lanes=1,
    )


def ranker_config(path: Path, towers: tuple[EmbeddingTowerConfig, ...], *, seed: int) -> TrainConfig:
    """Return a run of the ranker on a file of impressions."""
    from recis.metrics import ExactAuc

    table = partial(TableConfig, embedding_dim=17, initializer=Normal(0.0, 0.05), optimizer=Adam(lr=5e-3))
    dense = (DenseInput("position"), *(DenseInput(tower.name, WIDTH) for tower in towers))
    ranker = DeepFMConfig(
        tables=(
            table(name="words", features=(Feature("words", "mean"),)),
            table(name="item", features=("item",), admission=AfterSightings(3)),
        ),
        dense=dense,
        hidden=(128, 64),
        seed=seed,
    )
    return TrainConfig(
        name="product_ranker",
        model=WithTowers(ranker=ranker, towers=towers) if towers else ranker,
        train_data=replace(data_of(path), num_lanes=4, shuffle_rows=65_536, epochs=EPOCHS, seed=seed),
        features=(
            FeatureSpec(name="item", kind="sparse"),
            FeatureSpec(name="words", kind="sparse", ops=(Hash(),)),
            FeatureSpec(name="position", kind="dense"),
            FeatureSpec(name="click", kind="label"),
        ),
        metrics=(ExactAuc(),),
        dense_optimizer=ByPart(rest=DenseAdamW(lr=2e-3)),
        epochs=EPOCHS,
        seed=seed,
    )


def value_confidences(tokens: Sequence[int], log_probs: Sequence[float], separator: int) -> list[float]:
    """Return exp(mean log-probability) of each part of an answer's tokens, parts being cut at a separator's token."""
    parts: list[list[float]] = [[]]
    for token, log_prob in zip(tokens, log_probs, strict=True):
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(log_prob)
    return [math.exp(sum(part) / len(part)) if part else 0.0 for part in parts]
