"""What does a customer buy in the next 28 days? Online Retail (UCI 352): 333,639 purchase lines, 3,628 items to rank.

The run trains a ranker (retail_model) on lists at cut-offs every 14 days whose 28-day windows end before the split, 28 days
before the log's end, and validates on customers seen before the split who buy after it. Then it prints the baselines beside
it and trains the same model again with windows up to the log's end, in `final/`: that one answers `recis recommend`.
Items beyond a customer's candidates rank behind them, by the hand rule and then by popularity. Features, tables and
training settings were chosen on earlier windows only: `--set hide_weeks=4` leaves out the last four weeks altogether and
so makes the split the one they were chosen on.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from recis.embedding import Normal, TableConfig
from recis.errors import ConfigError
from recis.features import Bucketize, FeatureSpec, Hash
from recis.io import DataConfig, Dense, Floats, Strings
from recis.optim import Adam, Cosine
from recis.recipes.online_shoppers import find_data
from recis.recipes.retail_baselines import Quality, boosted_hits, measure_baselines, quality, ratio_interval
from recis.recipes.retail_features import CUSTOMER
from recis.recipes.retail_history import History
from recis.recipes.retail_log import WINDOW_DAYS, PurchaseLog, active_customers, read_log
from recis.recipes.retail_model import TOP, RankerConfig, list_loss, same
from recis.recipes.retail_snapshots import (
    FACTS,
    HISTORY_ITEMS,
    Prepared,
    Snapshot,
    prepare,
    read_summary,
    take_snapshot,
    write_snapshot,
)
from recis.trainer import DenseAdamW, TrainConfig, Trainer

if TYPE_CHECKING:
    from recis.runs import Run

SNAPSHOTS = "snapshots"
FINAL = "final"
OUTPUT = pa.schema(
    [
        ("CustomerID", pa.int64()),
        ("rank", pa.int32()),
        ("StockCode", pa.string()),
        ("score", pa.float32()),
        ("unknown_customer", pa.bool_()),
    ]
)
AGE_DAYS = (3.0, 7.0, 14.0, 28.0, 56.0, 84.0, 112.0, 168.0, 252.0)  # bounds of the ages that have a row each
DIM = 16
EPOCHS = 10
BATCH = 64


def online_retail(
    *,
    data: str | None,
    out: Path,
    hide_weeks: int = 0,
    num_cutoffs: int | None = None,
    final: bool = True,
    seed: int = 0,
) -> TrainConfig:
    """Return the run that is validated; `after` prints the comparison and trains the final model.

    Args:
        data: transactions.parquet or the folder it lies in; None: `online_retail` below RECIS_DATA.
        out: the run folder; snapshots are kept in it.
        hide_weeks: last weeks of the log that are left out as if they had not happened yet.
        num_cutoffs: cut-offs to learn from before the split, the latest ones; None takes all. Fewer train faster.
        final: whether to train the final model.
        seed: of the weights and the order of samples.
    """
    folder = out / SNAPSHOTS
    prepared = read_summary(folder)
    if prepared is None:
        if num_cutoffs is not None and num_cutoffs < 1:
            raise ConfigError(f"num_cutoffs must be at least 1 or None; got {num_cutoffs}")
        path = find_data(data, "online_retail", "transactions.parquet").resolve()
        prepared = prepare(hide(read_log(path), hide_weeks), path, folder, num_cutoffs=num_cutoffs)
    config = make_config(prepared, prepared.split - WINDOW_DAYS, name="online_retail", seed=seed)
    return replace(
        config,
        evaluate=partial(validate, snapshots=folder),
        after=partial(compare_and_finish, snapshots=folder, final=final),
    )


def hide(log: PurchaseLog, weeks: int) -> PurchaseLog:
    """Return a log without its last weeks.

    Raises:
        ConfigError: weeks is negative, or nothing is left.
    """
    if weeks < 0:
        raise ConfigError(f"hide_weeks must be at least 0; got {weeks}")
    shorter = log.before(log.end - 7 * weeks)
    if len(shorter) == 0:
        raise ConfigError(f"hide_weeks={weeks} leaves nothing of a log of {log.end - log.day[0]:.0f} days")
    return shorter


def make_config(prepared: Prepared, latest: float, *, name: str, seed: int) -> TrainConfig:
    """Return a run over the snapshots up to cut-off `latest`."""
    files = prepared.training_files(latest)
    steps = EPOCHS * math.ceil(prepared.num_rows(files) / BATCH)
    features = (
        FeatureSpec(name="candidates", kind="sparse", ops=(Hash(),)),
        FeatureSpec(name="history", kind="sparse", ops=(Hash(),)),
        FeatureSpec(name="history_age", kind="sparse", ops=(Bucketize(AGE_DAYS),)),
        FeatureSpec(name="facts", kind="dense"),
        FeatureSpec(name="customer", kind="dense"),
        FeatureSpec(name="bought", kind="extra"),
        FeatureSpec(name="num_bought", kind="extra"),
    )
    table = partial(TableConfig, embedding_dim=DIM, initializer=Normal(0.0, 0.05), optimizer=Adam(lr=3e-4))
    return TrainConfig(
        name=name,
        model=RankerConfig(
            tables=(
                table(name="item", features=("candidates", "history")),
                table(name="age", features=("history_age",)),
            ),
            num_candidates=prepared.num_candidates,
            mean=prepared.mean,
            std=prepared.std,
            num_facts=len(FACTS),
            history_items=HISTORY_ITEMS,
            seed=seed,
        ),
        train_data=replace(
            snapshot_data(prepared, files), batch_size=BATCH, num_lanes=4, shuffle_rows=4096, epochs=EPOCHS, seed=seed
        ),
        features=features,
        loss=list_loss,
        score=same,
        dense_optimizer=DenseAdamW(lr=2e-3, weight_decay=1e-2),
        schedule=Cosine(total_steps=steps, warmup_steps=max(1, steps // 10) if steps > 1 else 0),
        epochs=EPOCHS,
        seed=seed,
    )


def snapshot_data(prepared: Prepared, files: Sequence[Path]) -> DataConfig:
    """Return how snapshot files are read, in order."""
    width = prepared.num_candidates
    return DataConfig(
        paths=tuple(str(file) for file in files),
        format="parquet",
        columns=(
            Strings("candidates", depth=1),
            Strings("history", depth=1),
            Floats("history_age"),
            Dense("facts", width=width * len(FACTS)),
            Dense("customer", width=len(CUSTOMER)),
            Dense("bought", width=width),
            Dense("num_bought"),
        ),
        batch_size=256,
        num_lanes=1,
    )


# ---- validation


def list_scores(trainer: Trainer, prepared: Prepared, file: Path) -> torch.Tensor:
    """Return the model's scores [N, C] of a snapshot file's lists."""
    return torch.cat(list(trainer.predict(snapshot_data(prepared, [file]))))


def ranker_quality(trainer: Trainer, prepared: Prepared, file: Path) -> Quality:
    """Return the quality of the model's lists of a snapshot file."""
    return lists_quality(list_scores(trainer, prepared, file), file)


def lists_quality(scores: torch.Tensor, file: Path) -> Quality:
    """Return the quality of a snapshot file's lists by scores [N, C]; candidates come before all other items."""
    table = pq.read_table(file, columns=["bought", "num_bought"])
    bought = np.stack(table["bought"].to_numpy()) > 0
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP].numpy()
    hits = np.take_along_axis(bought, order, axis=1)
    return quality(hits, table["num_bought"].to_numpy().astype(np.int64))


def validate(trainer: Trainer, *, snapshots: Path) -> dict[str, float]:
    """Return recall@20 and ndcg@20 at the split."""
    prepared = kept_snapshots(snapshots)
    return means(ranker_quality(trainer, prepared, prepared.validation_file))


def evaluate_file(run: "Run", path: str) -> tuple[int, dict[str, float]]:
    """Return customers and metrics on the last four weeks of another purchase log, for `recis eval`."""
    log = read_log(find_data(path, "online_retail", "transactions.parquet"))
    cutoff = log.end - WINDOW_DAYS
    customers = active_customers(log, cutoff)
    if len(customers) == 0:
        raise ConfigError(f"--data {path}: nobody seen before its last four weeks buys in them")
    prepared = kept_snapshots(run.folder / SNAPSHOTS)
    history = History(log, cutoff)
    snapshot = take_snapshot(log, history, customers, num_candidates=prepared.num_candidates)
    with kept_in_file(snapshot, history) as file:
        found = ranker_quality(run.trainer, prepared, file)
    return len(customers), means(found)


def means(found: Quality) -> dict[str, float]:
    """Return recall@20 and ndcg@20."""
    return {f"recall@{TOP}": float(found.recall.mean()), f"ndcg@{TOP}": float(found.ndcg.mean())}


def kept_snapshots(snapshots: Path) -> Prepared:
    """Return the snapshots of a run; ConfigError where they are gone."""
    prepared = read_summary(snapshots)
    if prepared is None:
        raise ConfigError(f"{snapshots}: the snapshots of this run are gone or of another version; train it again")
    return prepared


@contextmanager
def kept_in_file(snapshot: Snapshot, history: History) -> Iterator[Path]:
    """Give a file with the snapshot, which is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snapshot.parquet"
        write_snapshot(snapshot, history, file)
        yield file


# ---- after training


def compare_and_finish(trainer: Trainer, out: Path | None, *, snapshots: Path, final: bool) -> None:
    """Print the model beside the baselines, then train the final model in `out/final`."""
    prepared = kept_snapshots(snapshots)
    log = read_log(prepared.data).before(prepared.end)
    print(comparison({"recis": ranker_quality(trainer, prepared, prepared.validation_file)}, prepared, log))
    if final and out is not None:
        config = make_config(prepared, prepared.split, name="online_retail_final", seed=trainer.config.seed)
        Trainer(config, out / FINAL, resume=True).train()


def comparison(ours: Mapping[str, Quality], prepared: Prepared, log: PurchaseLog) -> str:
    """Return the table of Recall@20 and NDCG@20 at the split, ours last, with each recall over the hand rule's."""
    customers = active_customers(log, prepared.split)
    found = measure_baselines(log, prepared.split, customers)
    boosted = boosted_hits(prepared.training_files(prepared.split - WINDOW_DAYS), prepared.validation_file)
    num_bought = pq.read_table(prepared.validation_file, columns=["num_bought"])["num_bought"].to_numpy()
    if boosted is not None:
        found["boosted trees over the rule's candidates"] = quality(boosted, num_bought.astype(np.int64))
    found.update(ours)
    rule = found["hand rule"].recall
    first = np.datetime64(int(prepared.split), "D")
    lines = [
        f"{len(customers):,} customers seen before {first} who bought in the {WINDOW_DAYS} days from then on:",
        f"  {'':<42}{'Recall@20':>10}{'NDCG@20':>10}   Recall over the hand rule's, 95 % interval",
    ]
    for name, value in found.items():
        low, high = ratio_interval(value.recall, rule)
        ratio = f"{value.recall.mean() / rule.mean():.4f}  [{low:.4f}, {high:.4f}]" if rule.any() else "-"
        lines.append(f"  {name:<42}{value.recall.mean():>10.4f}{value.ndcg.mean():>10.4f}   {ratio}")
    if boosted is None:
        lines.append("  (scikit-learn is not installed: no boosted trees beside)")
    return "\n".join(lines)


# ---- recommendation


def recommend_file(run: "Run", users: Path, *, k: int, out: Path) -> tuple[int, int]:
    """Write the k best items of each customer in a file; returns rows and customers the log does not know."""
    return write_recommendations(recommend(run.folder, read_customers(users), k), out)


def write_recommendations(table: pa.Table, out: Path) -> tuple[int, int]:
    """Write OUTPUT rows as Parquet; returns rows and unknown customers."""
    part = out.with_name(f".tmp-{out.name}")
    try:
        pq.write_table(table, part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    unknown = table.filter(table["unknown_customer"])["CustomerID"]
    return len(table), len(unknown.unique())


def snapshot_scores(trainer: Trainer, prepared: Prepared, snapshot: Snapshot, history: History) -> torch.Tensor:
    """Return the model's scores [N, C] of the lists of a snapshot."""
    with kept_in_file(snapshot, history) as file:
        return list_scores(trainer, prepared, file)


def recommend(
    folder: Path,
    customer_ids: np.ndarray,
    k: int,
    *,
    score: Callable[[Trainer, Prepared, Snapshot, History], torch.Tensor] = snapshot_scores,
) -> pa.Table:
    """Return OUTPUT rows: for each customer, in the order given, the k items most likely bought after the log's end.

    A score orders the items of one customer and means nothing beside. An unknown customer gets the items most customers
    bought in the last 30 days, with their share of the most popular one's buyers as score.

    Raises:
        ConfigError: the run has no final model or no snapshots.
    """
    from recis.runs import open_run  # recis.runs imports the recipes' list

    if not (folder / FINAL).is_dir():
        raise ConfigError(
            f"{folder}: has no final model (it was trained with final=False, or killed before); resume it"
        )
    prepared = kept_snapshots(folder / SNAPSHOTS)
    log = read_log(prepared.data).before(prepared.end)
    history = History(log, log.end)
    asked = np.array(list(dict.fromkeys(customer_ids.tolist())), dtype=np.int64)
    number = np.searchsorted(log.customer_ids, asked).clip(max=log.num_customers - 1)
    known = (log.customer_ids[number] == asked) & np.isin(number, log.customer)
    items, scores = _popular_lists(history, len(asked))
    if known.any():
        snapshot = take_snapshot(log, history, number[known], num_candidates=prepared.num_candidates)
        trainer = open_run(folder / FINAL).trainer
        found = score(trainer, prepared, snapshot, history)
        items[known], scores[known] = whole_ranking(snapshot, found, history.popularity)
    k = min(k, len(np.unique(log.item)))
    codes = pa.array(log.stock_codes)
    return pa.table(
        [
            np.repeat(asked, k),
            np.tile(np.arange(1, k + 1, dtype=np.int32), len(asked)),
            codes.take(pa.array(items[:, :k].reshape(-1))),
            scores[:, :k].reshape(-1),
            np.repeat(~known, k),
        ],
        schema=OUTPUT,
    )


def _popular_lists(history: History, num_lists: int) -> tuple[np.ndarray, np.ndarray]:
    """Return [N, I] items and scores: the most popular first, of equal ones those bought more often at all."""
    lines = np.bincount(history.lines.item, minlength=history.num_items)
    order = np.lexsort((-lines, -history.popularity))
    scores = history.popularity[order].astype(np.float32)
    return np.tile(order, (num_lists, 1)), np.tile(scores, (num_lists, 1))


def whole_ranking(snapshot: Snapshot, scores: torch.Tensor, popularity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all items [N, I] of each customer, best first, and scores that fall along them.

    Candidates go by the model's scores [N, C]; the others follow by the rule's, of equal ones by popularity.
    """
    listed = torch.from_numpy(snapshot.candidates)
    top, order = scores.sort(dim=1, descending=True, stable=True)
    rest = snapshot.rule.double() + 1e-9 * torch.from_numpy(popularity)
    rest = rest.scatter(1, listed, -torch.inf)
    others = rest.sort(dim=1, descending=True, stable=True).indices[:, : rest.shape[1] - listed.shape[1]]
    below = top[:, -1:] - 1 - torch.arange(others.shape[1])
    items = torch.cat([listed.gather(1, order), others], dim=1)
    return items.numpy(), torch.cat([top, below], dim=1).float().numpy()


def read_customers(path: Path) -> np.ndarray:
    """Return the CustomerIDs of a Parquet or CSV file with that column, or of a text with one id per line.

    Raises:
        ConfigError: there is no such column, or something in it is no whole number.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".parquet", ".csv"):
            table = pq.read_table(path) if suffix == ".parquet" else pyarrow.csv.read_csv(path)
            if "CustomerID" not in table.column_names:
                raise ConfigError(f"--users {path}: has no column 'CustomerID'; it has {', '.join(table.column_names)}")
            column = table["CustomerID"]
        else:
            words = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            column = pa.chunked_array([pa.array(words[1:] if words[:1] == ["CustomerID"] else words, pa.string())])
        ids = column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise ConfigError(f"--users {path}: a CustomerID must be a whole number ({error})") from error
    if ids.null_count:
        raise ConfigError(f"--users {path}: {ids.null_count} rows have no CustomerID; leave them out")
    return ids.to_numpy()
