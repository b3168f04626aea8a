"""Benchmark harness, and the commands that measure: what `make bench`, `recis roofline` and `recis gpu-check` need.

The options of the commands stand here, so that `recis --help` loads neither torch nor numba.
"""

import argparse
from pathlib import Path


def gpu_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of gpu-check."""
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the results; goes on with it")
    parser.add_argument("--max-minutes", type=float, metavar="N", help="start no step after N minutes")
    parser.add_argument(
        "--only", metavar="TEXT", help="only steps whose name contains this: test:, sanitizer:, bench:find"
    )
    parser.add_argument("--jobs", type=int, default=4, help="test files at a time (default: 4)")
    parser.add_argument("--dry-run", action="store_true", help="list the steps; needs no GPU")


def roofline_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of roofline."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what to measure (default: cuda where there is a GPU)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="also each op over its grid, with installed peers; minutes")
    parser.add_argument("--ops", metavar="A,B", help="with --full: only these ops")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="with --full: folder of page, picture and JSON (default: roofline)"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure the kernels' choices and store them")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="with --calibrate: where to store them (default: the user's cache)",
    )
