"""What a customer buys in the next 28 days, by sequence models: SASRec and HSTU over purchase lines (Online Retail, UCI 352).

    recis train retail_sasrec        recis train retail_hstu        recis recommend --run RUN --users FILE --out FILE

Split, customers, candidates, dense features, loss and metrics are those of `online_retail`; instead of attention over distinct
items, an encoder reads all lines before the cut-off in the order of time (`retail_readers`). `--set facts=false` leaves the
dense features out: what ids and times alone can tell; `--set lines=false` leaves ids and lines out instead. `after` prints
the baselines beside and trains the final model in `final/`, which answers `recis recommend`.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recis.embedding import Normal, TableConfig
from recis.errors import ConfigError
from recis.features import FeatureSpec, Hash
from recis.io import DataConfig, Ids, Strings
from recis.io.columns import Integer
from recis.models.hstu import Hstu
from recis.models.sasrec import SasRec
from recis.optim import Adam, Cosine
from recis.recipes.online_retail import (
    BATCH,
    DIM,
    FINAL,
    SNAPSHOTS,
    comparison,
    hide,
    kept_in_file,
    kept_snapshots,
    lists_quality,
    means,
    read_customers,
    recommend,
    snapshot_data,
    write_recommendations,
)
from recis.recipes.online_shoppers import find_data
from recis.recipes.retail_history import History
from recis.recipes.retail_lines import MAX_LINES, add_lines, write_lines
from recis.recipes.retail_log import WINDOW_DAYS, active_customers, read_log
from recis.recipes.retail_model import list_loss, same
from recis.recipes.retail_readers import CandidateStates, LastState, ReaderConfig, SequenceRankerConfig
from recis.recipes.retail_snapshots import FACTS, Prepared, Snapshot, prepare, read_summary, take_snapshot
from recis.trainer import DenseAdamW, TrainConfig, Trainer

if TYPE_CHECKING:
    from recis.runs import Run

LINES = "lines"
EPOCHS = 6
SASREC = LastState(encoder=SasRec(num_layers=1, num_heads=1, num_positions=MAX_LINES, dropout=0.1))
HSTU = CandidateStates(
    encoder=Hstu(
        num_layers=1,
        num_heads=2,
        head_width=16,
        divisor=64,
        num_distances=64,
        time_unit=60,
        num_time_buckets=14,
        dropout=0.1,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What scores read: dense features, ids and lines."""

    facts: bool
    lines: bool


def retail_sasrec(
    *,
    data: str | None,
    out: Path,
    hide_weeks: int = 0,
    num_cutoffs: int | None = None,
    facts: bool = True,
    lines: bool = True,
    final: bool = True,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> TrainConfig:
    """Return the run whose lines are read by SASRec.

    Args:
        data, out, hide_weeks, num_cutoffs, final, seed: see `online_retail`.
        facts: whether scores read the dense features.
        lines: whether scores read ids and lines.
        epochs: passes over the lists.
    """
    prepared = _prepare(data, out, hide_weeks, num_cutoffs)
    reads = Reads(facts=facts, lines=lines)
    return _run("retail_sasrec", SASREC, prepared, out, reads=reads, final=final, epochs=epochs, seed=seed)


def retail_hstu(
    *,
    data: str | None,
    out: Path,
    hide_weeks: int = 0,
    num_cutoffs: int | None = None,
    facts: bool = True,
    lines: bool = True,
    final: bool = True,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> TrainConfig:
    """Return the run whose lines are read by HSTU; as retail_sasrec."""
    prepared = _prepare(data, out, hide_weeks, num_cutoffs)
    reads = Reads(facts=facts, lines=lines)
    return _run("retail_hstu", HSTU, prepared, out, reads=reads, final=final, epochs=epochs, seed=seed)


def _prepare(data: str | None, out: Path, hide_weeks: int, num_cutoffs: int | None) -> Prepared:
    prepared = read_summary(out / SNAPSHOTS)
    if prepared is None:
        if num_cutoffs is not None and num_cutoffs < 1:
            raise ConfigError(f"num_cutoffs must be at least 1 or None; got {num_cutoffs}")
        path = find_data(data, "online_retail", "transactions.parquet").resolve()
        prepared = prepare(hide(read_log(path), hide_weeks), path, out / SNAPSHOTS, num_cutoffs=num_cutoffs)
    if any(not (out / LINES / name).is_file() for name in prepared.rows):
        write_lines(read_log(prepared.data).before(prepared.end), prepared, out / LINES)
    return prepared


def _run(
    name: str,
    reader: ReaderConfig,
    prepared: Prepared,
    out: Path,
    *,
    reads: Reads,
    final: bool,
    epochs: int,
    seed: int,
) -> TrainConfig:
    make = partial(make_config, prepared, reader, out / LINES, reads=reads, epochs=epochs, seed=seed)
    return replace(
        make(prepared.split - WINDOW_DAYS, name=name),
        evaluate=partial(validate, folder=out),
        after=partial(compare_and_finish, folder=out, reader=reader, reads=reads, final=final, epochs=epochs),
    )


def make_config(
    prepared: Prepared,
    reader: ReaderConfig,
    lines: Path,
    latest: float,
    *,
    name: str,
    reads: Reads,
    epochs: int,
    seed: int,
) -> TrainConfig:
    """Return a run over the lists up to cut-off `latest`."""
    files = prepared.training_files(latest)
    steps = epochs * math.ceil(prepared.num_rows(files) / BATCH)
    item = TableConfig(
        name="item",
        features=("candidates", "items"),
        embedding_dim=DIM,
        initializer=Normal(0.0, 0.05),
        optimizer=Adam(lr=3e-4),
    )
    extras = ("times", "now", "bought", "num_bought")
    return TrainConfig(
        name=name,
        model=SequenceRankerConfig(
            tables=(item,),
            reader=reader,
            num_candidates=prepared.num_candidates,
            mean=prepared.mean,
            std=prepared.std,
            num_facts=len(FACTS),
            use_facts=reads.facts,
            use_lines=reads.lines,
            seed=seed,
        ),
        train_data=replace(
            lines_data(prepared, [lines / file.name for file in files]),
            batch_size=BATCH,
            num_lanes=4,
            shuffle_rows=4096,
            epochs=epochs,
            seed=seed,
        ),
        features=(
            *(FeatureSpec(name=column, kind="sparse", ops=(Hash(),)) for column in ("candidates", "items")),
            *(FeatureSpec(name=column, kind="dense") for column in ("facts", "customer")),
            *(FeatureSpec(name=column, kind="extra") for column in extras),
        ),
        loss=list_loss,
        score=same,
        dense_optimizer=DenseAdamW(lr=2e-3, weight_decay=1e-2),
        schedule=Cosine(total_steps=steps, warmup_steps=max(1, steps // 10) if steps > 1 else 0),
        epochs=epochs,
        seed=seed,
    )


def lines_data(prepared: Prepared, files: Sequence[Path]) -> DataConfig:
    """Return how snapshot files with lines are read, in order."""
    data = snapshot_data(prepared, files)
    kept = tuple(column for column in data.columns if column.name not in ("history", "history_age"))
    return replace(data, columns=(*kept, Strings("items", depth=1), Ids("times"), Integer("now")))


# ---- validation and what comes after training


def scores_of(trainer: Trainer, prepared: Prepared, file: Path) -> torch.Tensor:
    """Return the model's scores [N, C] of the lists of a file with lines."""
    return torch.cat(list(trainer.predict(lines_data(prepared, [file]))))


def validate(trainer: Trainer, *, folder: Path) -> dict[str, float]:
    """Return recall@20 and ndcg@20 at the split."""
    prepared = kept_snapshots(folder / SNAPSHOTS)
    file = folder / LINES / prepared.validation_file.name
    return means(lists_quality(scores_of(trainer, prepared, file), file))


def compare_and_finish(
    trainer: Trainer, out: Path | None, *, folder: Path, reader: ReaderConfig, reads: Reads, final: bool, epochs: int
) -> None:
    """Print the model beside the baselines, then train the final model in `out/final`."""
    prepared = kept_snapshots(folder / SNAPSHOTS)
    file = folder / LINES / prepared.validation_file.name
    found = lists_quality(scores_of(trainer, prepared, file), file)
    print(comparison({trainer.config.name: found}, prepared, read_log(prepared.data).before(prepared.end)))
    if final and out is not None:
        config = make_config(
            prepared,
            reader,
            folder / LINES,
            prepared.split,
            name=f"{trainer.config.name}_final",
            reads=reads,
            epochs=epochs,
            seed=trainer.config.seed,
        )
        Trainer(config, out / FINAL, resume=True).train()


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
    scores = snapshot_scores(run.trainer, prepared, snapshot, history)
    with kept_in_file(snapshot, history) as file:
        return len(customers), means(lists_quality(scores, file))


def snapshot_scores(trainer: Trainer, prepared: Prepared, snapshot: Snapshot, history: History) -> torch.Tensor:
    """Return the model's scores [N, C] of the lists of a snapshot."""
    with kept_in_file(snapshot, history) as file, tempfile.TemporaryDirectory() as folder:
        with_lines = Path(folder) / "lines.parquet"
        add_lines(history.lines, history.cutoff, file, with_lines)
        return scores_of(trainer, prepared, with_lines)


def recommend_file(run: "Run", users: Path, *, k: int, out: Path) -> tuple[int, int]:
    """Write the k best items of each customer in a file; returns rows and customers the log does not know."""
    return write_recommendations(recommend(run.folder, read_customers(users), k, score=snapshot_scores), out)
