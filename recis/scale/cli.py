"""The commands `recis plan` and `recis simulate`: a few lines around the parts that do the work."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

OK, FAILED = 0, 1
SET_HELP = "set an option of the recipe, or a field of the run: train_data.batch_size=4096"


def add_scale(commands: Any) -> None:
    """Mount `plan` and `simulate` below the subparsers of `recis`."""
    _add_plan(commands)
    _add_simulate(commands)


def _add(commands: Any, name: str, run_command: Any, text: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command.set_defaults(run_command=run_command)
    return command


def _add_plan(commands: Any) -> None:
    plan = _add(
        commands,
        "plan",
        _plan,
        "Say what a recipe needs on N ranks: memory, time, where each table lies; code 1 where it cannot fit.",
        "recis plan online_retail --world 8 --memory-per-rank 16\n"
        "  recis plan my_recipe:my_run --world 64 --rows item=2000000000 --memory-per-rank 64",
    )
    plan.add_argument("recipe", help="as in recis train")
    plan.add_argument("--world", type=int, required=True, metavar="N", help="ranks, 1 to 4096")
    plan.add_argument("--memory-per-rank", type=float, metavar="GB", help="limit in 10^9 bytes; more is refused")
    plan.add_argument(
        "--rows", action="append", default=[], metavar="TABLE=N", help="rows when training ends, if known"
    )
    plan.add_argument("--trace", type=Path, metavar="FILE", help="take the ids from this trace, not from the data")
    _add_recipe(plan)
    _add_costs(plan)


def _add_simulate(commands: Any) -> None:
    simulate = _add(
        commands,
        "simulate",
        _simulate,
        "Replay a trace of ids over up to 4096 ranks: load balance, bytes, memory, time of a step.",
        "recis simulate --record online_retail --trace retail.parquet\n"
        "  recis simulate --measure\n"
        "  recis simulate --world 1024 --trace retail.parquet --batch 32 --hot-ids 1000",
    )
    work = simulate.add_mutually_exclusive_group(required=True)
    work.add_argument("--world", type=int, metavar="W", help="replay --trace over W ranks, 1 to 4096")
    work.add_argument("--record", metavar="RECIPE", help="write the ids of a recipe's first samples to --trace")
    work.add_argument("--measure", action="store_true", help="measure this machine's costs, and keep them")
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="Parquet of id lists, or FILE.npy of ids")
    simulate.add_argument(
        "--batch", type=int, metavar="B", help="samples of a rank per step (default: the trace's, or 256)"
    )
    simulate.add_argument("--steps", type=int, metavar="N", help="steps to replay (default: all the trace has)")
    simulate.add_argument("--hot-ids", type=int, default=0, metavar="K", help="ids that every rank keeps a copy of")
    simulate.add_argument("--columns", metavar="A,B", help="the trace's id columns; others are not read")
    simulate.add_argument(
        "--dim", type=int, default=16, help="row width, where the trace says nothing of tables (default: 16)"
    )
    _add_recipe(simulate)
    _add_costs(simulate)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="PATH", help="file or folder that the recipe reads")
    command.add_argument("--set", action="append", default=[], metavar="A.B=C", help=SET_HELP)
    command.add_argument(
        "--samples", type=int, default=200_000, metavar="N", help="samples to look at (default: 200,000)"
    )


def _add_costs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--costs", type=Path, metavar="FILE", help="costs file (default: this machine's, in the user's cache)"
    )
    command.add_argument(
        "--link-gb-per-s", type=float, metavar="X", help="bandwidth between ranks, in place of the measured"
    )
    command.add_argument(
        "--link-latency-us", type=float, metavar="X", help="time of a message, in place of the measured"
    )
    command.add_argument("--cores", type=int, metavar="C", help="all ranks share C cores (default: a core for each)")


def _plan(args: argparse.Namespace) -> int:
    from recis.distributed import plan as planning
    from recis.scale.planning import plan_recipe

    with redirect_stdout(sys.stderr):  # whatever a recipe prints: stdout is for the plan
        plan = plan_recipe(
            args.recipe,
            world_size=args.world,
            memory_gb=args.memory_per_rank,
            data=args.data,
            settings=args.set,
            rows=args.rows,
            trace=args.trace,
            max_samples=args.samples,
            costs=args.costs,
            link=(args.link_gb_per_s, args.link_latency_us),
            cores=args.cores,
        )
    if args.json:
        _print_json("plan", args.recipe, args.data, args.world, planning.metrics(plan), planning.to_json(plan))
    else:
        print("\n".join(planning.lines(plan)))
    return FAILED if plan.fits is False else OK


def _simulate(args: argparse.Namespace) -> int:
    from recis.errors import ConfigError

    say = partial(print, file=sys.stderr)
    if args.measure:
        from recis.scale.costs_file import measured

        costs = measured(args.costs, say)
        print(json.dumps(costs.to_json()) if args.json else costs.describe())
        return OK
    if args.trace is None:
        raise ConfigError("--trace FILE is needed: the trace to write with --record, or to replay with --world")
    return _record(args) if args.record is not None else _replay(args)


def _record(args: argparse.Namespace) -> int:
    from recis.scale.recipe import opened, record

    with redirect_stdout(sys.stderr), opened(args.record, data=args.data, settings=args.set) as config:
        facts = record(config, args.trace, max_samples=args.samples, max_steps=args.steps)
    whole = "a whole epoch" if facts.is_whole else "the first"
    print(f"{args.trace}: {facts.samples:,} samples ({whole}), {len(facts.shape.tables)} tables", file=sys.stderr)
    if args.json:
        figures = {"samples": facts.samples, "tables": len(facts.shape.tables)}
        _print_json("simulate", args.record, args.data, facts.samples, figures, {"trace": str(args.trace)})
    return OK


def _replay(args: argparse.Namespace) -> int:
    from recis.distributed import simulate as simulation
    from recis.distributed.replay import check_world
    from recis.distributed.trace import Trace
    from recis.scale.costs_file import known

    check_world(args.world)
    columns = None if args.columns is None else args.columns.split(",")
    trace = Trace(args.trace, columns=columns, dim=args.dim)
    costs = known(args.costs)
    if costs is not None:
        costs = costs.with_link(gb_per_s=args.link_gb_per_s, latency_us=args.link_latency_us)
    result = simulation.simulate(
        trace,
        world_size=args.world,
        batch=args.batch,
        hot_ids=args.hot_ids,
        max_steps=args.steps,
        costs=costs,
        cores=args.cores,
    )
    if args.json:
        samples = result.num_steps * result.batch * result.world_size
        more = simulation.to_json(result)
        _print_json("simulate", None, str(args.trace), samples, simulation.metrics(result), more)
    else:
        print("\n".join(simulation.lines(result)))
    return OK


def _print_json(
    command: str, model: str | None, data: str | None, count: int, metrics: Mapping[str, float], more: Mapping[str, Any]
) -> None:
    import torch

    versions = {"recis": version("recis"), "torch": torch.__version__, "python": sys.version.split()[0]}
    head: dict[str, Any] = {"command": command, "model": model, "data": data, "n": count, "metrics": metrics}
    print(json.dumps({**head, **more, "versions": versions}))


def rows_of(texts: Sequence[str]) -> dict[str, int]:
    """Return {table: rows} of TABLE=N texts.

    Raises:
        ConfigError: a text of another form, or rows below 1.
    """
    from recis.errors import ConfigError

    found: dict[str, int] = {}
    for text in texts:
        table, _, number = text.rpartition("=")
        try:
            rows = int(float(number)) if "e" in number.lower() else int(number.replace("_", ""))
        except ValueError:
            rows = 0
        if not table or rows < 1:
            raise ConfigError(f"--rows {text!r}: must be TABLE=N with N at least 1, such as item=2000000 or item=2e9")
        found[table] = rows
    return found
