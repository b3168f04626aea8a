"""The command `relevance`: one function per subcommand, each a few lines around the part that does the work.

Exit codes: 0 ok, 1 failure, 2 usage (a wrong argument or setting), 3 partly done (out of time, or bad rows listed). A failure
is one line on stderr; `--debug` shows the traceback.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, RecisError

OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3
SPLITS = ("train", "dev", "test")
NAMES = ("sft", "dpo", "grpo", "taosr1", "agrl", "she", "dyknow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see recis.cli: spinning workers slow down a shared machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run_command"):
        parser.print_help()
        return USAGE
    sys.path.insert(0, str(Path.cwd()))  # rules and rewards given as module:attribute
    try:
        return args.run_command(args)
    except KeyboardInterrupt:
        print(
            f"relevance {args.command}: stopped by the user; --resume goes on from the last checkpoint", file=sys.stderr
        )
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (RecisError, OSError, ImportError, ValueError, RuntimeError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"relevance {args.command}: {_one_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED
    finally:
        sys.path.remove(str(Path.cwd()))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    if "out of memory" in text.lower():
        return f"{text}: lower engine.per_device_rows and raise engine.accumulation, or set engine.gradient_checkpointing=true"
    return text if isinstance(error, RecisError) else f"{type(error).__name__}: {text} (--debug shows where)"


def _train(args: argparse.Namespace) -> int:
    from relevance.ranks import from_main
    from relevance.training_run import open_run

    if args.resume and args.out is None:
        raise ConfigError("--resume needs --out: the folder of the run to go on with")
    out = args.out or Path("runs") / from_main(f"{args.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    run = open_run(
        args.recipe,
        model=args.model,
        data=args.data,
        out=out,
        settings=args.set,
        resume=args.resume,
        max_minutes=args.max_minutes,
        say=_say,
    )
    from relevance.engine import OutOfTime
    from relevance.recipes import recipe_function

    _quiet_libraries()
    try:
        final = recipe_function(args.recipe)(run)
    except OutOfTime as stopped:
        _say(f"{stopped}: --out {out}")
        return PARTLY
    _say(f"model: {final}\ncurves: {out / 'curves.html'}")
    return OK


def _score(args: argparse.Namespace) -> int:
    from relevance.serve import Scorer, score_file

    _quiet_libraries()
    scorer = Scorer.load(args.model, chunk=args.chunk, rules=args.rules)
    done = score_file(scorer, args.source, args.out, rationale=args.rationale)
    print(f"{done.num_scored:,} pairs scored: {args.out}")
    if done.num_bad:
        print(f"{done.num_bad:,} bad rows left out: {done.errors}", file=sys.stderr)
    return PARTLY if done.num_bad else OK


def _eval(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.ebrm is None):
        raise ConfigError("eval measures one thing: give --model, or --ebrm with the folder of an EBRM")
    if args.ebrm is not None:
        return _eval_ebrm(args)
    from relevance.judge import judge
    from relevance.serve import Scorer

    _quiet_libraries()
    scorer = Scorer.load(args.model, chunk=args.chunk)
    pairs = _labelled(args, scorer)
    report = judge(scorer, pairs[: args.limit], num_texts=args.texts, num_bootstrap=args.bootstrap)
    if args.json:
        _print_json(report)
        return OK
    for name, value in report.items():
        if isinstance(value, int | float):
            low, high = report["interval"].get(name, (None, None))
            print(f"{name:<24}{value:>12.4f}" + ("" if low is None else f"   95 % {low:.4f} to {high:.4f}"))
    for name, numbers in report["slices"].items():
        print(f"{name:<24}" + "".join(f"  {key} {value:.4g}" for key, value in numbers.items()))
    return OK


def _eval_ebrm(args: argparse.Namespace) -> int:
    """Print how often an EBRM's verdicts are the gold steps."""
    from relevance.ebrm_verifier import agreement_report
    from relevance.files import read_pairs

    if args.data is None:
        raise ConfigError("--ebrm needs --data: pairs with gold steps, as `relevance data` writes them")
    every = read_pairs(args.data)
    pairs = [pair for pair in every if pair.split == args.part][: args.limit]
    fit_on = [pair for pair in every if args.fit and pair.split == "dev"]
    if args.fit and (args.part == "dev" or not fit_on):
        raise ConfigError("--fit takes the part dev for the cuts: --data needs one, and --part another")
    report = agreement_report(args.ebrm, pairs, fit_on=fit_on)
    if args.json:
        _print_json(report)
        return OK
    print(f"EBRM {report['model']} against gold steps, {report['num_pairs']} pairs, part {args.part}")
    print("cuts " + ", ".join(f"{name} {value:.4f}" for name, value in report["thresholds"].items()))
    for name, numbers in report["slices"].items():
        print(f"{name:<14}" + "".join(f"  {key} {value:.4g}" for key, value in numbers.items()))
    return OK


def _labelled(args: argparse.Namespace, scorer: Any) -> list[Any]:
    """Return the pairs of --data, or the part of the generated catalogue that the model was trained with."""
    if args.data is not None:
        from relevance.files import read_pairs

        return read_pairs(args.data)
    from recis.trainer.serialize import from_json
    from relevance.catalog import make_catalog

    stored = scorer.settings.get("catalog")
    if stored is None:
        raise ConfigError("--data: the model was not trained on the generated catalogue; give labelled pairs")
    return list(getattr(make_catalog(from_json(stored)), args.part))


def _export(args: argparse.Namespace) -> int:
    from relevance.export import export
    from relevance.files import read_pairs
    from relevance.serve import Scorer

    _quiet_libraries()
    pairs = [pair for pair in read_pairs(args.source) if pair.split in args.part]
    count = export(Scorer.load(args.model), pairs, args.out, allow_leak=args.allow_leak)
    print(f"{count:,} rows: {args.out}")
    return OK


def _data(args: argparse.Namespace) -> int:
    from relevance.files import write_rows

    if args.for_ebrm and args.offers is not None:
        raise ConfigError("--for-ebrm is for the generated catalogue: `recis ebrm train --data` reads --offers itself")
    if args.offers is not None:
        from relevance.pricerunner import read_pricerunner

        counts: dict[str, int] | None = None
        if args.queries is not None:
            counts = dict.fromkeys(("train", "dev", "test"), args.queries)
        pairs = read_pricerunner(args.offers, num_queries=counts, with_chunks=args.chunks)
    else:
        from recis.trainer.override import override
        from relevance.catalog import CatalogConfig, make_catalog

        config = override(CatalogConfig(with_chunks=args.chunks, omit_rate=0.3 * args.chunks), args.set)
        catalog = make_catalog(config)
        if args.for_ebrm:
            from relevance.ebrm_verifier import write_ebrm_folder

            print(f"for recis ebrm train: {write_ebrm_folder(args.out, catalog.train, catalog.dev)}")
            return OK
        pairs = [*catalog.train, *catalog.dev, *catalog.test]
    digest = write_rows(args.out, pairs)
    print(f"{len(pairs):,} pairs: {args.out}\nsha256 {digest}")
    return OK


def _curves(args: argparse.Namespace) -> int:
    from relevance.run_log import write_curves

    print(write_curves(args.run))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from relevance.demo import run_demo

    _quiet_libraries()
    run_demo(args.out, settings=args.set, say=_say)
    return OK


def _ladder(args: argparse.Namespace) -> int:
    import time

    from relevance.ladder import find_preset, run_ladder

    preset = find_preset(args.preset)
    _quiet_libraries()
    out = args.out or Path("runs") / f"ladder-{preset.name}"
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    left = run_ladder(preset, out, only=args.rows, settings=args.set, deadline=deadline, say=_say)
    print((out / "ladder.md").read_text() if (out / "ladder.md").exists() else "")
    if left:
        print(f"{len(left)} cells are left; the same command goes on")
    return PARTLY if left else OK


def _quiet_libraries() -> None:
    """Leave stdout and stderr to this program: no progress bars, no warnings about names that TRL itself uses."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def _say(line: str) -> None:
    from relevance.ranks import is_main

    if is_main():
        print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relevance", description="Grade (query, item) pairs with language models.")
    parser.add_argument("--version", action="version", version=f"relevance {version('recis')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = _add(commands, "train", _train, "train a model with a recipe")
    train.add_argument("recipe", choices=NAMES, help="which recipe")
    train.add_argument("--model", help="start from this model (default: a tiny one, made here)")
    train.add_argument("--data", help="pairs as .jsonl or .parquet (default: the generated catalogue)")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE-TIME)")
    train.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set a field of the recipe's config")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--max-minutes", type=float, help="stop with a checkpoint after this time; exit code 3")
    _add_asking(commands)
    _add_running(commands)
    return parser


def _add_asking(commands: Any) -> None:
    score = _add(commands, "score", _score, "score pairs: label probabilities, tier, rationale where asked for")
    score.add_argument("--model", required=True, help="folder `final` of a run, or any causal language model")
    score.add_argument("--in", dest="source", type=Path, required=True, help="pairs as .jsonl or .parquet")
    score.add_argument("--out", type=Path, required=True, help="scores as .jsonl or .parquet")
    score.add_argument("--rationale", action="store_true", help="also write the text behind each label")
    score.add_argument("--chunk", choices=("auto", "none"), default="auto", help="show chunks (default: as trained)")
    score.add_argument("--rules", help="catalog, none, or module:attribute (default: as trained)")
    evaluate = _add(commands, "eval", _eval, "measure a model on labelled pairs")
    evaluate.add_argument("--model", help="folder `final` of a run, or any causal language model")
    evaluate.add_argument("--ebrm", type=Path, help="instead: hold this EBRM's verdicts against gold steps of --data")
    evaluate.add_argument(
        "--fit", action="store_true", help="with --ebrm: first fit its cuts on gold steps of part dev"
    )
    evaluate.add_argument("--data", help="labelled pairs (default: the generated catalogue the model was trained with)")
    evaluate.add_argument("--part", choices=SPLITS, default="test", help="part of the catalogue")
    evaluate.add_argument("--limit", type=int, default=None, help="measure the first pairs only")
    evaluate.add_argument("--texts", type=int, default=200, help="pairs answered in full (default: %(default)s)")
    evaluate.add_argument(
        "--bootstrap", type=int, default=2000, help="resamples of the intervals (default: %(default)s)"
    )
    evaluate.add_argument("--chunk", choices=("auto", "none"), default="auto", help="show chunks (default: as trained)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    export = _add(commands, "export", _export, "write label probabilities as columns of a recis ranker")
    export.add_argument("--model", required=True, help="folder `final` of a run")
    export.add_argument("--in", dest="source", type=Path, required=True, help="pairs as .jsonl or .parquet")
    export.add_argument("--out", type=Path, required=True, help="columns as .parquet")
    export.add_argument(
        "--part", nargs="+", choices=SPLITS, default=list(SPLITS), help="pairs of these parts only (default: all)"
    )
    export.add_argument("--allow-leak", action="store_true", help="also for queries that the model was trained on")


def _add_running(commands: Any) -> None:
    data = _add(commands, "data", _data, "write the generated catalogue, or the PriceRunner task, as pairs")
    data.add_argument("--out", type=Path, required=True, help="pairs as .jsonl or .parquet")
    data.add_argument("--offers", type=Path, help="PriceRunner's offers.parquet instead of the generated catalogue")
    data.add_argument("--queries", type=int, help="queries of each part of the offers (default: the whole task)")
    data.add_argument("--for-ebrm", action="store_true", help="write --out as a folder that `recis ebrm train` reads")
    data.add_argument("--chunks", action="store_true", help="give every pair a chunk, and leave facts out of titles")
    data.add_argument("--set", action="append", default=[], metavar="A=B", help="set a field of the catalogue's config")
    curves = _add(commands, "curves", _curves, "write the page with a run's training curves")
    curves.add_argument("run", type=Path, help="folder of a run")
    demo = _add(commands, "demo", _demo, "SFT and a short reinforcement run, before and after")
    demo.add_argument("--out", type=Path, default=Path("runs/relevance-demo"), help="folder (default: %(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set a field of the recipe's config")
    ladder = _add(commands, "ladder", _ladder, "run the whole comparison, cell by cell")
    ladder.add_argument("--preset", default="smoke", help="smoke, quick or full (default: %(default)s)")
    ladder.add_argument("--rows", nargs="*", default=[], help="these rows only, with those that they start from")
    ladder.add_argument("--out", type=Path, help="folder (default: runs/ladder-PRESET)")
    ladder.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set a field in every row that has it"
    )
    ladder.add_argument("--max-minutes", type=float, help="stop with a checkpoint after this time; exit code 3")


def _add(commands: Any, name: str, run_command: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run_command=run_command)
    return command


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
