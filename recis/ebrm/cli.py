"""The commands `recis ebrm ...`: one function per command, a few lines around the part that does the work."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recis.ebrm.serve import add_serve_arguments, run_serve
from recis.ebrm.train_command import add_train_arguments, run_train
from recis.errors import ConfigError, DataError

if TYPE_CHECKING:
    from recis.ebrm.datasets import EvalSet
    from recis.ebrm.entities import Item
    from recis.ebrm.model import EBRM

OK, FAILED = 0, 1
ITEMS_HELP = "items as JSON lines; or Parquet with the columns of the PriceRunner file, for a model trained on offers"


def add_ebrm(commands: Any) -> None:
    """Mount `ebrm` and its commands below the subparsers of `recis`."""
    text = "Relevance of items to queries from their entities: train, evaluate, score, explain, overrule, precompute."
    ebrm = commands.add_parser("ebrm", help=text, description=text)
    below = ebrm.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "Train a model: first on (query, entity) pairs, then on (query, item) pairs."
    add_train_arguments(_add(below, "train", run_train, text))
    _add_demo(below)
    command = _add(below, "eval", _eval, "Measure a model on graded pairs, or on a file of offers that it never saw.")
    _add_model(command)
    command.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="labels as JSON lines, or Parquet of offers"
    )
    command.add_argument("--items", type=Path, metavar="FILE", help="of the labels (default: items.jsonl beside them)")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command = _add(below, "score", _score, "Score items for a query, best first.")
    _add_model(command, query=True)
    command.add_argument("--items", type=Path, required=True, metavar="FILE", help=ITEMS_HELP)
    command.add_argument("--top", type=int, default=10, help="how many to print (default 10)")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command = _add(below, "explain", _explain, "Show why an item got its relevance, entity by entity.")
    _add_model(command, query=True)
    command.add_argument("--items", type=Path, required=True, metavar="FILE", help=ITEMS_HELP)
    command.add_argument("--item", required=True, metavar="ID")
    command = _add(below, "precompute", _precompute, "Score queries x entities into a cache; start it again to go on.")
    _add_model(command)
    command.add_argument("--queries", type=Path, required=True, metavar="FILE", help="text, one a line, best first")
    command.add_argument("--items", type=Path, required=True, metavar="FILE", help=ITEMS_HELP)
    command.add_argument("--top", type=int, default=10_000, help="how many queries (default 10000)")
    command.add_argument("--rebuild", action="store_true", help="start empty, whatever the cache holds")
    _add_override(below)
    add_serve_arguments(_add(below, "serve", run_serve, "Serve a model over HTTP, with a page for people."))


def _add_demo(below: Any) -> None:
    text = (
        "Train on a generated catalogue, compare with other models, explain and overrule a score, and serve the model."
    )
    command = _add(below, "demo", _demo, text)
    command.add_argument("--out", type=Path, default=Path("runs/ebrm_demo"), metavar="DIR", help="a new folder")
    command.add_argument("--serve", action=argparse.BooleanOptionalAction, default=True, help="serve at the end")
    command.add_argument("--port", type=int, default=8080, help="of the page; 0 takes a free one (default 8080)")
    command.add_argument("--queries", type=int, help="generated, of all parts (default 600)")
    command.add_argument("--epochs", type=int, default=1, help="of the second stage (default 1)")
    command.add_argument("--seed", type=int, default=0)


def _demo(args: argparse.Namespace) -> int:
    from recis.ebrm.demo import run_demo

    return run_demo(args)


def _add_override(below: Any) -> None:
    command = _add(below, "override", _override, "Add, list or remove rules that overrule scores, or print the audit.")
    _add_model(command)
    command.add_argument("action", choices=("add", "list", "remove", "audit"))
    command.add_argument("--query", help="add: this query alone")
    command.add_argument("--query-regex", help="add: queries in which this is found")
    command.add_argument("--entity", metavar="TYPE:VALUE", help="add: acts on this entity")
    command.add_argument("--type", help="add: acts on all of this type")
    command.add_argument("--op", choices=("set", "min", "max"), help="add")
    command.add_argument("--value", type=float, help="add: in [0, 1]")
    command.add_argument("--expires", metavar="YYYY-MM-DD", help="add: last day")
    command.add_argument("--version", type=int, help="remove: which rule")
    command.add_argument("--owner", help="add, remove: who answers for it")
    command.add_argument("--reason", default="")
    command.add_argument("--since", metavar="DATE", help="audit: from this day or time on")


def _add(commands: Any, name: str, run_command: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run_command=run_command)
    return command


def _add_model(command: argparse.ArgumentParser, *, query: bool = False) -> None:
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder that `train` wrote")
    if query:
        command.add_argument("--query", required=True)


def _eval(args: argparse.Namespace) -> int:
    from recis.ebrm.model import EBRM
    from recis.ebrm.runs import finite_or_none, measure, read_manifest

    with redirect_stdout(sys.stderr):  # whatever a library prints: stdout is for the result
        model = EBRM.load(args.model)
        data = _eval_set(args, model)
        threshold = read_manifest(args.model).get("f1_threshold_log_r")
        metrics, num_calls = measure(model, data, f1_threshold=threshold)
    if args.json:
        versions = {"recis": version("recis"), "torch": version("torch"), "python": sys.version.split()[0]}
        head = {"command": "ebrm eval", "model": str(args.model), "data": str(args.data), "n": len(data.pairs)}
        print(json.dumps({**head, "metrics": finite_or_none(metrics), "versions": versions}))
    else:
        print(f"{args.data}: {len(data.pairs):,} pairs, {num_calls:,} (query, entity) pairs encoded")
        print("\n".join(f"{name:>20}  {value:.4f}" for name, value in metrics.items()))
    return OK


def _eval_set(args: argparse.Namespace, model: "EBRM") -> "EvalSet":
    from recis.ebrm.datasets import labels_eval, offers_eval
    from recis.ebrm.runs import read_dictionaries

    if args.data.suffix == ".parquet":
        return offers_eval(args.data, read_dictionaries(args.model))
    return labels_eval(args.data, _items(args.items or args.data.parent / "items.jsonl", args.model, model))


def _items(path: Path, folder: Path, model: "EBRM") -> "list[Item]":
    from recis.ebrm.datasets import offers_items
    from recis.ebrm.files import read_items
    from recis.ebrm.runs import read_dictionaries

    if path.suffix == ".parquet":
        return offers_items(path, read_dictionaries(folder))
    return list(read_items(path, model.config.schema))


def _score(args: argparse.Namespace) -> int:
    import numpy as np

    from recis.ebrm.model import EBRM

    model = EBRM.load(args.model)
    items = _items(args.items, args.model, model)
    scored = model.score(args.query, items)
    order = np.argsort(-scored.log_r, kind="stable")[: args.top].tolist()
    p = None if scored.calibrator is None else scored.p
    rows = [
        {
            "item": scored.item_ids[place],
            "r": float(scored.r[place]),
            "p": None if p is None else float(p[place]),
            "approximate": bool(scored.approximate[place]),
            "title": items[place].title,
        }
        for place in order
    ]
    if args.json:
        head = {"query": scored.query, "model_version": model.version, "overrides": list(scored.overrides)}
        print(json.dumps({**head, "items": rows}))
        return OK
    for row in rows:
        shown = "     -" if row["p"] is None else f"{row['p']:.4f}"
        print(f"r {row['r']:.4f}  p {shown}  {row['item']}  {row['title']}")
    return OK


def _explain(args: argparse.Namespace) -> int:
    from recis.ebrm.explanation import explain
    from recis.ebrm.model import EBRM

    model = EBRM.load(args.model)
    found = [item for item in _items(args.items, args.model, model) if item.id == args.item]
    if not found:
        raise DataError(f"no item {args.item!r}", file=str(args.items), option="ids are those of the items file")
    print(explain(model, args.query, found[0]))
    return OK


def _override(args: argparse.Namespace) -> int:
    from recis.ebrm.model import EBRM
    from recis.ebrm.overrides import Override

    overrides = EBRM.load(args.model).overrides
    if args.action == "add":
        _need(args, ("op", "value", "owner"))
        names = ("op", "value", "owner", "query", "query_regex", "entity", "type", "reason", "expires")
        rule = overrides.add(Override(**{name: getattr(args, name) for name in names}))
        flags = f" ({', '.join(rule.flags)})" if rule.flags else ""
        print(f"{rule.id}: {json.dumps(rule.override.to_json())}{flags}")
    elif args.action == "remove":
        _need(args, ("version", "owner"))
        overrides.remove(args.version, owner=args.owner, reason=args.reason)
        print(f"o{args.version} removed")
    elif args.action == "list":
        gone = {rule.id for rule in overrides.expired()}
        for rule in overrides.rules():
            print(f"{rule.id}{' expired' if rule.id in gone else ''}: {json.dumps(rule.override.to_json())}")
    else:
        for record in overrides.audit(args.since):
            print(json.dumps(record))
    return OK


def _need(args: argparse.Namespace, names: Sequence[str]) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"override {args.action} needs {', '.join(missing)}")


def _precompute(args: argparse.Namespace) -> int:
    from recis.ebrm.model import EBRM
    from recis.ebrm.persist import CACHE_NAME
    from recis.ebrm.precompute import precompute

    model = EBRM.load(args.model, rebuild_cache=args.rebuild)
    model.open_cache(args.model / CACHE_NAME)
    try:
        lines = args.queries.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", file=str(args.queries)) from error
    queries = [line for line in lines if line.strip()][: args.top]
    items = _items(args.items, args.model, model)
    done = precompute(
        model, queries, items, on_flush=lambda count, pairs: print(f"{count:,} queries, {pairs:,} pairs encoded")
    )
    print(f"{args.model / CACHE_NAME}: {done.num_queries:,} queries, {done.num_pairs:,} pairs, of which")
    print(f"{done.num_encoded:,} were encoded now; {done.num_failed:,} failed")
    return FAILED if done.num_failed else OK
