"""The command `recis`: one function per subcommand, each a few lines around the part that does the work.

Exit codes: 0 ok, 1 failure or fault found, 2 usage (a wrong argument, config or file), 3 partly done (bad rows listed).
A failure is one line on stderr; `--debug` shows the traceback.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recis.errors import CheckpointError, ConfigError, DataError, RecisError

OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run_command"):
        parser.print_help()
        return USAGE
    try:
        return args.run_command(args)
    except KeyboardInterrupt:
        print("recis: stopped by the user; the last checkpoint is whole, go on with --resume", file=sys.stderr)
        return FAILED
    except (RecisError, OSError, ImportError, ValueError, RuntimeError) as error:
        if args.debug:
            traceback.print_exc()
        kind = "" if isinstance(error, RecisError) else f"{type(error).__name__}: "
        print(f"recis {args.command}: {kind}{_one_line(error)}", file=sys.stderr)
        usage = isinstance(error, ConfigError | DataError) and not isinstance(error, CheckpointError)
        return USAGE if usage else FAILED


def _one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())


def _train(args: argparse.Namespace) -> int:
    from recis.runs import start_run

    run = start_run(args.recipe, data=args.data, out=args.out, settings=args.set, resume=args.resume)
    run.train()
    for line in run.bad_rows():
        print(f"left out: {line}", file=sys.stderr)
    print(f"run folder: {run.folder}")
    return PARTLY if run.bad_rows() else OK


def _eval(args: argparse.Namespace) -> int:
    from recis.runs import open_run

    run = open_run(args.run)
    num_samples, metrics = run.evaluate(args.data)
    if args.json:
        _print_json("eval", args.run, args.data, num_samples, metrics)
    else:
        print("\n".join(f"{name:>16}  {value:.6g}" for name, value in metrics.items()))
    return OK


def _predict(args: argparse.Namespace) -> int:
    from recis.predictions import write_predictions
    from recis.runs import open_run

    count = write_predictions(open_run(args.run), args.data, args.out)
    print(f"{args.out}: {count:,} rows")
    return OK


def _recommend(args: argparse.Namespace) -> int:
    from recis.runs import open_run

    count, unknown = open_run(args.run).recommend(args.users, k=args.k, out=args.out)
    print(f"{args.out}: {count:,} rows; {unknown:,} users unknown to the model got the popular list")
    return OK


def _inspect(args: argparse.Namespace) -> int:
    from recis.checkpoint import inspect

    summary = inspect(args.dir)
    if args.json:
        print(json.dumps(summary))
        return OK
    print(f"{summary['path']}: step {summary['step']:,}, {summary['bytes'] / 1e6:.1f} MB, {summary['kind']}")
    for name, table in summary["tables"].items():
        print(
            f"  table {name}: {table['rows']:,} rows x {table['dim']} {table['dtype']}, optimizer {table['optimizer']}, ",
            end="",
        )
        print(f"{table['bytes'] / 1e6:.1f} MB")
    print(f"  dense: {summary['dense_parameters']:,} parameters")
    return OK


def _verify(args: argparse.Namespace) -> int:
    from recis.checkpoint import verify

    problems = verify(args.dir)
    print(f"{args.dir}: {'FAULTY' if problems else 'ok'}")
    for problem in problems:
        print(f"  {problem}")
    return FAILED if problems else OK


def _compact(args: argparse.Namespace) -> int:
    from recis.checkpoint import compact

    print(compact(args.dir, args.out))
    return OK


def _report(args: argparse.Namespace) -> int:
    from recis.trainer.report import write_report

    print(write_report(args.dir, args.out))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from recis.recipes.demo import run_demo

    return OK if run_demo(args.out, settings=args.set) else FAILED


def _bench_report(args: argparse.Namespace) -> int:
    from recis.bench.report import load_rows, to_html, to_text

    rows = load_rows(args.file)
    print(to_text(rows))
    if args.html is not None:
        args.html.write_text(to_html(rows))
    return OK


def _print_json(command: str, model: Path, data: str, num_samples: int, metrics: dict[str, float]) -> None:
    import torch

    values = {name: None if value != value else value for name, value in metrics.items()}  # NaN is no JSON
    versions = {"recis": version("recis"), "torch": torch.__version__, "python": sys.version.split()[0]}
    result: dict[str, Any] = {"command": command, "model": str(model), "data": data, "n": num_samples}
    print(json.dumps({**result, "metrics": values, "versions": versions}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recis", description="Train, evaluate and serve sparse-dense models.")
    parser.add_argument("--version", action="version", version=f"recis {version('recis')}")
    parser.set_defaults(debug=False, command="")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def add(name: str, run_command: Any, help_text: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, **options)
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        command.set_defaults(run_command=run_command)
        return command

    demo = add("demo", _demo, "Train on a generated click log, kill and resume once, and show how good the model is.")
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo-DATE-TIME)")
    demo.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set an option or a field of the run")
    train = add("train", _train, "Train a recipe.")
    train.add_argument("recipe", help="demo, online_retail, online_shoppers, open_bandit, or your own module:function")
    train.add_argument("--data", help="file or folder the recipe reads; default: what RECIS_DATA names, or generated")
    train.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-DATE-TIME)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set an option or a field of the run"
    )
    evaluate = add("eval", _eval, "Evaluate a run on a file.")
    evaluate.add_argument("--run", type=Path, required=True)
    evaluate.add_argument("--data", required=True)
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    predict = add("predict", _predict, "Write the input rows with a column `prediction`.")
    predict.add_argument("--run", type=Path, required=True)
    predict.add_argument("--data", required=True)
    predict.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    recommend = add("recommend", _recommend, "Rank items for users after the training data ends.")
    recommend.add_argument("--run", type=Path, required=True)
    recommend.add_argument("--users", type=Path, required=True, help="CSV, Parquet or text with the users' ids")
    recommend.add_argument("--k", type=int, default=20)
    recommend.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    inspect = add("inspect", _inspect, "Show tables, rows, sizes and optimizer of a run's newest checkpoint.")
    inspect.add_argument("dir", type=Path)
    inspect.add_argument("--json", action="store_true")
    verify = add("verify", _verify, "Check every byte of a checkpoint, or of all checkpoints of a run.")
    verify.add_argument("dir", type=Path)
    compact = add("compact", _compact, "Merge a checkpoint and the deltas on it into one full checkpoint.")
    compact.add_argument("dir", type=Path, help="the newest delta, or the run")
    compact.add_argument("--out", type=Path, help="folder to write (default: beside the newest delta)")
    report = add("report", _report, "Write one HTML page about a run.")
    report.add_argument("dir", type=Path)
    report.add_argument("--out", type=Path)
    bench = commands.add_parser("bench", help="Results of `make bench`.")
    bench_commands = bench.add_subparsers(metavar="COMMAND", required=True)
    bench_report = bench_commands.add_parser("report", help="Print the table of a result file.")
    bench_report.add_argument("file", type=Path)
    bench_report.add_argument("--html", type=Path, help="also write a page with bars")
    bench_report.add_argument("--debug", action="store_true")
    bench_report.set_defaults(run_command=_bench_report)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
