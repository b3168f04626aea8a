"""Run the whole comparison cell by cell, and write its table and plots.

    run_ladder(PRESETS["quick"], Path("runs/ladder"))        one cell = one row with one seed

A cell that is done has `result.json` and is not run again; one that was stopped goes on. Each seed's rows start from that
seed's SFT checkpoint; reinforcement rows see the same number of prompts and rollouts, and the table has each cell's tokens.
Intervals: 95 % percentile bootstrap, seeds then whole queries; differences are drawn in pairs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from recis.errors import ConfigError, nearest
from recis.trainer.override import override
from relevance.checkpoints import write_json
from relevance.data import HARD_FAMILIES, Pair
from relevance.judge import judge, predictions, statistic
from relevance.ladder_report import write_ladder
from relevance.ladder_rows import PRESETS, ROWS, Preset, Row
from relevance.run_log import LOG_NAME, read_log
from relevance.serve import Scorer
from relevance.training_run import FINAL, TrainingRun, open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row with one seed."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.row.name}-s{self.seed}"


def cells_of(preset: Preset, only: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of a preset in the order in which they can run: starts first.

    Raises:
        ConfigError: `only` names no row.
    """
    wanted = list(only) or list(preset.rows)
    for name in wanted:
        if name not in ROWS:
            raise ConfigError(f"--rows: no row {name!r}; {nearest(name, ROWS)}")
    names: list[str] = []
    for name in wanted:
        names += [start for start in (ROWS[name].start,) if start is not None and start not in names]
        names += [name] if name not in names else []
    return [Cell(row=ROWS[name], seed=seed) for seed in preset.seeds for name in names]


def run_ladder(
    preset: Preset,
    out: Path,
    *,
    only: Sequence[str] = (),
    settings: Sequence[str] = (),
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Cell]:
    """Run the cells that are not done, rewrite the report after each, and return the cells that are left.

    Args:
        preset: see `ladder_rows`.
        out: the ladder's folder.
        only: rows to run; those they start from come with them.
        settings: "a.b=c" on top of the preset's.
        deadline: of time.monotonic(); the cell that it meets is stopped with a checkpoint.
        say: where progress goes.
    """
    from relevance.engine import OutOfTime

    cells = cells_of(preset, only)
    for number, cell in enumerate(cells):
        folder = out / "cells" / cell.name
        if (folder / "result.json").exists():
            continue
        if deadline is not None and time.monotonic() >= deadline:
            return cells[number:]
        say(f"ladder: {cell.row.title}, seed {cell.seed} ({number + 1} of {len(cells)})")
        try:
            _run_cell(cell, preset, out, settings=settings, deadline=deadline, say=say)
        except OutOfTime as stopped:
            say(str(stopped))
            return cells[number:]
        write_ladder(out, preset, cells)
    write_ladder(out, preset, cells)
    return []


def _run_cell(
    cell: Cell,
    preset: Preset,
    out: Path,
    *,
    settings: Sequence[str],
    deadline: float | None,
    say: Callable[[str], None],
) -> None:
    from relevance.recipes import default_config, recipe_function

    folder, start = out / "cells" / cell.name, time.monotonic()
    model = None if cell.row.start is None else str(out / "cells" / f"{cell.row.start}-s{cell.seed}" / FINAL)
    config = default_config(cell.row.recipe)
    own = [*known_settings(config, preset.settings), *cell.row.settings, *known_settings(config, settings)]
    own += [f"seed={cell.seed}", f"catalog.seed={cell.seed}"]
    spent = _seconds(folder)
    run = open_run(
        cell.row.recipe,
        model=model,
        out=folder,
        settings=own,
        resume=folder.exists(),
        say=say,
    )
    run = replace(run, deadline=deadline)
    try:
        final = recipe_function(cell.row.recipe)(run)
    finally:
        write_json(folder / "seconds.json", {"seconds": spent + time.monotonic() - start})
    _measure(cell, preset, run, final)


def known_settings(config: Any, settings: Sequence[str]) -> list[str]:
    """Return the settings whose field the config has."""
    kept = []
    for setting in settings:
        owner: Any = config
        for part in setting.partition("=")[0].split("."):
            owner = getattr(owner, part, _Missing)
        if owner is not _Missing:
            config = override(config, [setting])  # a wrong value is an error all the same
            kept.append(setting)
    return kept


class _Missing:
    """Stands for a field that a config does not have."""


def _seconds(folder: Path) -> float:
    path = folder / "seconds.json"
    if not path.exists():
        return 0.0
    import json

    return float(json.loads(path.read_text())["seconds"])


def _measure(cell: Cell, preset: Preset, run: TrainingRun[Any], final: Path) -> None:
    """Ask the finished model about the test part and keep metrics and predictions."""
    scorer = Scorer.load(final)
    pairs = [pair for pair in run.task.test if pair.label is not None][: preset.num_test]
    report = judge(scorer, pairs, num_texts=preset.num_texts, num_bootstrap=200)
    columns = predictions(scorer, pairs)
    hard = np.array([pair.family in HARD_FAMILIES for pair in pairs])
    report["hard_macro_f1"] = statistic("macro_f1")({name: values[hard] for name, values in columns.items()})
    report["query"] = np.unique([pair.query_id for pair in pairs], return_inverse=True)[1].tolist()
    report["hard"] = hard.tolist()
    report["gold"], report["said"] = columns["gold"].tolist(), columns["said"].tolist()
    if cell.row.is_rag:
        report |= _asked_without_and_with_random(scorer, pairs)
    report |= {
        "row": cell.row.name,
        "seed": cell.seed,
        "tokens": _tokens(run.folder),
        "seconds": _seconds(run.folder),
    }
    write_json(run.folder / "result.json", report)


def _asked_without_and_with_random(scorer: Scorer, pairs: Sequence[Pair], *, seed: int = 1) -> dict[str, Any]:
    """Return the accuracies of a RAG model by chunk kind, without any chunk, and with chunks of other pairs."""
    plain = replace(scorer, task=replace(scorer.task, with_chunk=False))
    order = list(range(len(pairs)))
    Random(seed).shuffle(order)
    mixed = [replace(pair, chunk=pairs[order[place]].chunk) for place, pair in enumerate(pairs)]
    shown = predictions(scorer, pairs)
    right = shown["said"] == shown["gold"]
    bare = predictions(plain, pairs)["said"] == shown["gold"]
    kinds = np.array(["" if pair.chunk is None else str(pair.chunk.kind) for pair in pairs])
    return {
        "with_chunk": float(right.mean()),
        "without_chunk": float(bare.mean()),
        "random_chunk": float((predictions(scorer, mixed)["said"] == shown["gold"]).mean()),
        "by_kind": {
            kind: {"with": float(right[kinds == kind].mean()), "without": float(bare[kinds == kind].mean())}
            for kind in sorted(set(kinds.tolist()) - {""})
        },
    }


def _tokens(folder: Path) -> int:
    """Return the tokens that a cell has generated and passed forward, as Trainer and our trainer count them."""
    total = 0
    for path in folder.rglob(LOG_NAME):
        entries = read_log(path)
        counts = [entry["num_tokens"] for entry in entries if entry.get("num_tokens") is not None]
        total += int(max(counts, default=0))
    return total


def find_preset(name: str) -> Preset:
    """Return a preset by name; raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
