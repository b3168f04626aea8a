"""How good EBRM is beside what it is compared with, on the generated catalogue and on the PriceRunner task.

    RECIS_DATA=... python benchmarks/quality_ebrm.py run generated --rows ebrm,cross_encoder --seeds 3 --out FILE.json
    python benchmarks/quality_ebrm.py table FILE.json

A cell is a task, a row and a seed; each is written to the file as it ends, and what the file holds is not run again. All
trained rows of a task have the same encoder, labels, epochs and batches: `ebrm_tasks` says how many. Everything is chosen on
dev; the figures are of test. The hand rules need no training and are strong where labels come from the same structure.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from ebrm_rows import ROWS
from ebrm_table import differences, keep_scores, print_table
from ebrm_tasks import TASKS
from quality_record import Record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    below = parser.add_subparsers(dest="what", required=True)
    run = below.add_parser("run", help="fill the cells that the file lacks")
    run.add_argument("task", choices=sorted(TASKS))
    run.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)} (default: all, in this order)")
    run.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N - 1 of the trained rows (default 3)")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--out", type=Path, required=True)
    table = below.add_parser("table", help="print the table of a file")
    table.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.what == "table":
        for name in TASKS:
            found = differences(args.file, name)
            if found:
                Record(args.file).add(f"{name}/ebrm", {"differences": found})
        print(print_table(args.file, {name: row.title for name, row in ROWS.items()}))
        return
    names = args.rows.split(",")
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        parser.error(f"--rows: unknown {', '.join(unknown)}; known are {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    task = TASKS[args.task](os.environ.get("RECIS_DATA"))
    record = Record(args.out)
    for seed in range(args.seeds):
        for name in names:
            row = ROWS[name]
            if not row.fits(task) or (seed and not row.is_trained):
                continue

            def make(seed: int, row=row, name=name) -> dict[str, Any]:
                start = time.perf_counter()
                figures = row.run(task, seed)
                keep_scores(args.out, args.task, name, seed, figures.pop("scores"), task.test.truth)
                return figures | {"seconds": round(time.perf_counter() - start, 1)}

            command = f"benchmarks/quality_ebrm.py run {args.task} --rows {name} --seeds {args.seeds}"
            runs = record.runs(f"{args.task}/{name}", [seed], row.settings(task), make, command=command)
            shown = runs[0]["metrics"]
            print(f"{args.task} {name} seed {seed}: ROC-AUC {shown['roc_auc']:.4f}, {runs[0]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
