"""How good the tagger is on QueryNER and OA-Mine: baselines, rules, distilled from seed words, supervised.

    RECIS_DATA=... python benchmarks/quality_tagger.py PART [PART ...] --out benchmarks/results/DATE-cpu-quality_tagger.json

Parts: baselines, bounds, supervised, supervised_small, distilled, rules_from_gold, oa_mine, oa_mine_dictionary. Each run is
written to the file as it ends; what the file holds is not run again. QueryNER: train on `train`, figures on `dev`; models
are chosen by dev, and the first seed's also tags `test`. The seed words were chosen by reading the unlabelled train
queries, not their labels; of dev gold, distillation uses thresholds only.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from quality_record import Record, spread
from tagger_distilled import LOOP, NEURAL, SPREAD, distilled, seed_list
from tagger_oa_mine import OA_NEURAL, oa_mine, oa_mine_dictionary
from tagger_queryner import (
    GOLD_FLOORS,
    GOLD_RULES,
    SUPERVISED,
    SUPERVISED_SMALL,
    baselines,
    bounds,
    rules_from_gold,
    supervised,
    supervised_small,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the table; `measured` leads to the scores in a run whose micro F1 is summed up over seeds."""

    run: Callable[[Path, int], dict[str, Any]]
    settings: Mapping[str, Any]
    measured: tuple[str, ...] = ()
    """Without it nothing is drawn, and one run is enough."""


PARTS = {
    "baselines": Part(baselines, {}),
    "bounds": Part(bounds, {}),
    "supervised": Part(supervised, asdict(SUPERVISED), ("dev",)),
    "supervised_small": Part(supervised_small, asdict(SUPERVISED_SMALL), ("dev",)),
    "distilled": Part(
        distilled,
        {
            "loop": asdict(LOOP),
            "spread": {**asdict(SPREAD), "joining": (), "ends_head": ()},
            "neural": asdict(NEURAL),
            **seed_list(),
        },
        ("dev",),
    ),
    "rules_from_gold": Part(rules_from_gold, {**asdict(GOLD_RULES), "floors": GOLD_FLOORS}),
    "oa_mine_dictionary": Part(oa_mine_dictionary, {}),
    "oa_mine": Part(oa_mine, asdict(OA_NEURAL), ("dev",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N - 1 (default 3)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["RECIS_DATA"])
    record = Record(args.out)
    for name in args.parts:
        part = PARTS[name]
        seeds = range(args.seeds if part.measured else 1)
        command = f"python benchmarks/quality_tagger.py {name} --seeds {args.seeds}"
        runs = record.runs(
            name, seeds, part.settings, lambda seed, run=part.run: _timed(run, data, seed), command=command
        )
        if part.measured:
            record.add(name, {"micro_f1": spread([reduce(getitem, part.measured, run)["micro_f1"] for run in runs])})


def _timed(run: Callable[[Path, int], dict[str, Any]], data: Path, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    figures = run(data, seed)
    wall_s = round(time.perf_counter() - began, 1)
    print(f"{getattr(run, '__name__', run)} seed {seed}: {wall_s} s", flush=True)
    return {"threads": torch.get_num_threads(), "wall_s": wall_s, **figures}


if __name__ == "__main__":
    main()
