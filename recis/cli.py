"""The command `recis`: one function per subcommand, each a few lines around the part that does the work.

Exit codes: 0 ok, 1 failure or fault found, 2 usage (a wrong argument or setting), 3 partly done (bad rows listed, or
gpu-check out of time).
A failure is one line on stderr; `--debug` shows the traceback. Only faults of ours end in a traceback without it.
"""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, RecisError

OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3
MAX_LISTED = 1000  # rows a reader lists (recis.io.reader)
SET_HELP = "set an option of the recipe, or a field of the run: max_steps=100, train_data.on_bad_row=skip"
READ_HELP = (
    "how the file is read: train_data.on_bad_row=skip leaves bad rows out and lists them, train_data.batch_size=8192"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # torch's OpenMP workers spin after each operation by default. Where anything else wants a core (our readers, another
    # process) a step then waits for a worker that is not running: 13 times slower was measured on two busy cores. The
    # OpenMP runtime reads this once, when torch is loaded, which no command has done yet; a user's own setting stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run_command"):
        parser.print_help()
        return USAGE
    try:
        with _importable(Path.cwd()):
            return args.run_command(args)
    except KeyboardInterrupt:
        way_on = "; the last checkpoint is whole, go on with --resume" if args.command == "train" else ""
        print(f"recis {args.command}: stopped by the user{way_on}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of our output has seen enough: recis inspect RUN | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (RecisError, OSError, ImportError, ValueError, RuntimeError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"recis {args.command}: {_one_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, RecisError) else f"{type(error).__name__}: {text} (--debug shows where)"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Find modules in the folder the user stands in, as `python -m` does, for recipes given as module:function."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _train(args: argparse.Namespace) -> int:
    from recis.distributed.launch import joined
    from recis.runs import start_run

    with joined(timeout_s=args.join_timeout_s) as job:
        is_first = job is None or job.rank == 0
        with nullcontext() if is_first else _silent():
            run = start_run(args.recipe, data=args.data, out=args.out, settings=args.set, resume=args.resume, job=job)
            metrics = run.train()
            if metrics:
                values = ", ".join(f"{key} {value:.5g}" for key, value in metrics.items())
                print(f"step {run.trainer.state.step:,}: {values}")
            print(f"run folder: {run.folder}")
            code = _end(run.bad_rows())
            run.trainer.close()
    return code if job is None else OK  # torchrun takes any other code of a rank for a failure and stops the job


@contextmanager
def _silent() -> Iterator[None]:
    """Print nothing on standard output: in a job, rank 0 speaks for all."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _eval(args: argparse.Namespace) -> int:
    from recis.runs import open_run

    with redirect_stdout(sys.stderr):  # whatever a model or recipe prints: stdout is for the result
        run = open_run(args.run, settings=args.set)
        print(run.weights)
        num_samples, metrics = run.measure(args.data)
    if args.json:
        _print_json("eval", args.run, args.data, num_samples, metrics)
    else:
        print(f"{args.data}: {num_samples:,} samples")
        print("\n".join(f"{name:>16}  {value:.6g}" for name, value in metrics.items()))
    return _end(run.bad_rows())


def _predict(args: argparse.Namespace) -> int:
    from recis.predictions import write_predictions
    from recis.runs import open_run

    run = open_run(args.run, settings=args.set)
    print(run.weights, file=sys.stderr)
    count = write_predictions(run, args.data, args.out)
    print(f"{args.out}: {count:,} rows")
    return _end(run.bad_rows())


def _recommend(args: argparse.Namespace) -> int:
    from recis.runs import open_run

    run = open_run(args.run)
    print(run.weights, file=sys.stderr)
    count, unknown = run.recommend(args.users, k=args.k, out=args.out)
    print(f"{args.out}: {count:,} rows; {unknown:,} users unknown to the model got the popular list")
    return OK


def _end(bad_rows: Sequence[str]) -> int:
    """List the rows that were left out, and return how the command ended."""
    if not bad_rows:
        return OK
    for line in bad_rows:
        print(f"left out: {line}", file=sys.stderr)
    more = ", the first of more" if len(bad_rows) >= MAX_LISTED else ""
    print(f"{len(bad_rows):,} rows were left out{more}", file=sys.stderr)
    return PARTLY


def _inspect(args: argparse.Namespace) -> int:
    from recis.checkpoint import inspect

    summary = inspect(_folder(args.dir))
    print(json.dumps(summary) if args.json else "\n".join(_inspect_lines(summary)))
    return OK


def _inspect_lines(summary: dict[str, Any]) -> Iterator[str]:
    yield f"{summary['path']}: step {summary['step']:,}, {summary['kind']}, {_megabytes(summary['bytes'])}"
    if "checkpoints" in summary:
        yield f"checkpoints: {', '.join(summary['checkpoints'])}"
    head = ("table", "rows", "dim", "type", "optimizer", "size", "inserted", "rejected", "evicted", "full")
    rows: list[tuple[str, ...]] = [head]
    for name, table in summary["tables"].items():
        counters = [f"{table['counters'].get(key, 0):,}" for key in head[6:]]
        rule = {key: value for key, value in table["optimizer"].items() if key in ("lr", "weight_decay") and value}
        optimizer = f"{table['optimizer']['kind']}({', '.join(f'{key}={value:g}' for key, value in rule.items())})"
        shape = (f"{table['rows']:,}", str(table["dim"]), table["dtype"])
        rows.append((name, *shape, optimizer, _megabytes(table["bytes"]), *counters))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 3, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield f"{summary['rows']:,} rows in all; dense: {summary['dense_parameters']:,} parameters"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _verify(args: argparse.Namespace) -> int:
    from recis.checkpoint import verify

    problems = verify(_folder(args.dir))
    print(f"{args.dir}: {'FAULTY' if problems else 'ok'}")
    for problem in problems:
        print(f"  {problem}")
    return FAILED if problems else OK


def _compact(args: argparse.Namespace) -> int:
    from recis.checkpoint import as_checkpoint, compact

    print(compact(as_checkpoint(_folder(args.dir)), args.out))
    return OK


def _report(args: argparse.Namespace) -> int:
    from recis.trainer.report import write_report

    print(write_report(_folder(args.dir), args.out))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from recis.recipes.demo import run_demo

    return OK if run_demo(args.out, settings=args.set) else FAILED


def _bench_report(args: argparse.Namespace) -> int:
    from recis.bench.report import load_rows, to_html, to_text

    files = {path: load_rows(path) for path in args.files}
    print("\n\n".join(f"== {path}\n{to_text(rows)}" for path, rows in files.items()))
    if args.html is not None:
        args.html.write_text(to_html([row for rows in files.values() for row in rows]))
    return OK


def _roofline(args: argparse.Namespace) -> int:
    from recis.bench.roofline import run_command

    return run_command(args)


def _gpu_check(args: argparse.Namespace) -> int:
    from recis.bench.gpu_check import run_command

    return run_command(args)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give the folder of a run or of a checkpoint")
    return path


def _print_json(command: str, model: Path, data: str, num_samples: int, metrics: dict[str, float]) -> None:
    import torch

    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is no JSON
    versions = {"recis": version("recis"), "torch": torch.__version__, "python": sys.version.split()[0]}
    result: dict[str, Any] = {"command": command, "model": str(model), "data": data, "n": num_samples}
    print(json.dumps({**result, "metrics": values, "versions": versions}))


def _parser() -> argparse.ArgumentParser:
    from recis.ebrm.cli import add_ebrm
    from recis.scale.cli import add_scale
    from recis.tagger.cli import add_tag
    from recis.towers.cli import add_towers

    parser = argparse.ArgumentParser(
        prog="recis",
        description="Train, evaluate and serve sparse-dense recommendation models.",
        epilog="exit codes: 0 ok, 1 failure or fault found, 2 usage, 3 partly done (bad rows are listed)",
    )
    parser.add_argument("--version", action="version", version=f"recis {version('recis')}")
    parser.set_defaults(debug=False, command="")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_work(commands)
    _add_looks(commands)
    add_ebrm(commands)
    add_tag(commands)
    add_towers(commands)
    add_scale(commands)
    bench = commands.add_parser("bench", help="Results of `make bench`.", description="Results of `make bench`.")
    bench_commands = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    report = _add(
        bench_commands,
        "report",
        _bench_report,
        "Print the table of result files: our time, each peer's ratio, and whether targets are met.",
        "recis bench report benchmarks/results/2026-11-29-cpu-*.json --html bench.html",
    )
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    report.add_argument("--html", type=Path, help="also write a page with bars")
    _add_measuring(commands)
    return parser


def _add(commands: Any, name: str, run_command: Any, text: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run_command=run_command)
    return command


def _add_work(commands: Any) -> None:
    """Commands that train a model or use one."""
    demo = _add(
        commands,
        "demo",
        _demo,
        "Train on a generated click log, kill and resume once, and show how good the model is.",
        "recis demo --out runs/demo",
    )
    demo.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/demo-DATE-TIME)")
    demo.add_argument("--set", action="append", default=[], metavar="A.B=C", help=SET_HELP)
    train = _add(
        commands,
        "train",
        _train,
        "Train a recipe, or go on with a run.",
        "recis train online_retail --data shared/data/online_retail --out runs/retail\n"
        "  torchrun --nproc-per-node 4 -m recis train online_retail --out runs/retail\n"
        "  recis train my_recipe:my_run --out runs/mine --set max_steps=1000\n"
        "  recis train my_recipe:my_run --out runs/mine --resume",
    )
    train.add_argument(
        "recipe", help="demo, online_retail, online_shoppers, open_bandit, or your own module:function in this folder"
    )
    train.add_argument("--data", metavar="PATH", help="file or folder to read; default: from RECIS_DATA, or generated")
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-DATE-TIME)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, with its data and settings")
    train.add_argument("--set", action="append", default=[], metavar="A.B=C", help=SET_HELP)
    train.add_argument(
        "--join-timeout-s",
        type=float,
        default=300.0,
        metavar="S",
        help="under torchrun: seconds the processes wait for each other to start (default: 300)",
    )
    evaluate = _add(
        commands,
        "eval",
        _eval,
        "Evaluate a run on a file.",
        "recis eval --run runs/demo --data runs/demo/data/day-07.parquet --json",
    )
    _add_run(evaluate)
    evaluate.add_argument("--data", required=True, metavar="PATH", help="Parquet, ORC, CSV or JSONL with labels")
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    evaluate.add_argument("--set", action="append", default=[], metavar="A.B=C", help=READ_HELP)
    predict = _add(
        commands,
        "predict",
        _predict,
        "Write the rows of a file in their order, with a column `prediction` (prediction.TASK for each of several).",
        "recis predict --run runs/demo --data today.parquet --out scored.parquet",
    )
    _add_run(predict)
    predict.add_argument(
        "--data", required=True, metavar="PATH", help="Parquet, ORC, CSV or JSONL; labels may be absent"
    )
    predict.add_argument("--out", type=Path, required=True, metavar="FILE.parquet", help="file to write")
    predict.add_argument("--set", action="append", default=[], metavar="A.B=C", help=READ_HELP)
    recommend = _add(
        commands,
        "recommend",
        _recommend,
        "Rank items for users after the training data ends.",
        "recis recommend --run runs/retail --users customers.csv --k 20 --out top20.parquet",
    )
    _add_run(recommend)
    recommend.add_argument(
        "--users", type=Path, required=True, metavar="FILE", help="CSV, Parquet or text with the users' ids"
    )
    recommend.add_argument("--k", type=int, default=20, help="items per user (default: 20)")
    recommend.add_argument("--out", type=Path, required=True, metavar="FILE.parquet", help="file to write")


def _add_measuring(commands: Any) -> None:
    """Commands that measure the machine."""
    from recis.bench import gpu_options, roofline_options

    roofline = _add(
        commands,
        "roofline",
        _roofline,
        "Measure what this machine can do (10 s); with --full, each op beside that limit and beside other libraries.",
        "recis roofline\n  recis roofline --full --out roofline",
    )
    roofline_options(roofline)
    check = _add(
        commands,
        "gpu-check",
        _gpu_check,
        "On a GPU: run the kernel tests, compute-sanitizer and the benchmark table; goes on where the last one stopped.",
        "recis gpu-check --out benchmarks/results/h200 --max-minutes 25",
    )
    gpu_options(check)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="a run (its newest whole checkpoint), or a checkpoint"
    )


def _add_looks(commands: Any) -> None:
    """Commands that look at a run."""
    inspect = _add(
        commands,
        "inspect",
        _inspect,
        "Show tables, rows, dims, optimizers, id counts and sizes of a run's newest checkpoint, or of a checkpoint.",
        "recis inspect runs/demo",
    )
    inspect.add_argument("dir", type=Path, metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="one JSON object on stdout")
    verify = _add(
        commands,
        "verify",
        _verify,
        "Check every byte of a checkpoint, or of all checkpoints of a run; exit code 1 when one is damaged.",
        "recis verify runs/demo",
    )
    verify.add_argument("dir", type=Path, metavar="DIR")
    compact = _add(
        commands,
        "compact",
        _compact,
        "Merge a delta checkpoint and all it stands on into one full checkpoint.",
        "recis compact runs/demo/step_000002000 --out compacted",
    )
    compact.add_argument("dir", type=Path, metavar="DIR", help="a delta, or a run (its newest checkpoint)")
    compact.add_argument("--out", type=Path, metavar="DIR", help="folder for the result (default: replace the delta)")
    report = _add(
        commands,
        "report",
        _report,
        "Write one self-contained HTML page: curves, calibration, AUC per group, table growth, throughput.",
        "recis report runs/demo --out demo.html",
    )
    report.add_argument("dir", type=Path, metavar="DIR")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="page to write (default: DIR/report.html)")


if __name__ == "__main__":
    raise SystemExit(main())
