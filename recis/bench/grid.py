"""Run ops over a grid of (D, dtype, duplication, bag length) beside the peers that are installed: `recis roofline --full`.

Every point is checked, then ours and the peers take turns until about a second of each is spent, at most 30 rounds.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from recis.bench import model_cases, op_cases, peers, value_cases
from recis.bench.harness import alternate
from recis.bench.op_cases import Point, Work
from recis_kernels.dispatch import Impl

DIMS = (16, 64, 128)
SECONDS_PER_IMPL, MOST_ROUNDS, LEAST_ROUNDS = 0.6, 30, 5
TABLE_FLOATS = {"cpu": 1 << 26, "cuda": 1 << 30}  # rows times D: beyond any cache
NUM_BAGS = {"cpu": 8192, "cuda": 65_536}
NUM_KEYS = {"cpu": 1 << 18, "cuda": 1 << 20}
INDEX_IDS = {"cpu": 4 << 20, "cuda": 64 << 20}

Build = Callable[[Point, torch.device, Impl], Work]


def points(op: str, kind: str, *, scale: float = 1.0) -> Iterator[tuple[Build, Point]]:
    """Yield the jobs of an op on a kind of device ("cpu", "cuda"); scale shrinks them for tests."""

    def sized(dim: int = 64, **more: Any) -> Point:
        num_rows = max(64, int(TABLE_FLOATS[kind] // dim * scale))
        return Point(dim=dim, num_rows=num_rows, num_bags=max(4, int(NUM_BAGS[kind] * scale)), **more)

    keys = Point(
        bag_length=1, num_bags=max(8, int(NUM_KEYS[kind] * scale)), num_rows=max(64, int(INDEX_IDS[kind] * scale))
    )
    both: tuple[Any, Any] = ("uniform", "zipf")
    bf16, fp32 = torch.bfloat16, torch.float32
    if op in ("find", "find_or_insert"):
        loads = (0.5, 0.75) if op == "find" else (0.5,)
        build = op_cases.find_hits if op == "find" else op_cases.insert_new
        for load, distribution in itertools.product(loads, both if op == "find" else both[:1]):
            yield build, replace(keys, load=load, distribution=distribution)
    elif op == "unique_ids":
        yield from ((op_cases.unique, sized(distribution=distribution)) for distribution in both)
    elif op in ("gather", "pooled"):
        build = op_cases.gather if op == "gather" else op_cases.pooled
        for dim, dtype, distribution in itertools.product(DIMS, (fp32, bf16), both):
            point = sized(dim, dtype=dtype, distribution=distribution)
            # an output above 32 MiB is given fresh pages by the system at every call: they would be most of the time
            yield build, replace(point, num_bags=max(4, point.num_bags // 4)) if op == "gather" else point
        if op == "pooled":
            yield from ((build, sized(bag_length=length)) for length in (1, 5, 50))
    elif op == "step":
        dims = itertools.product(DIMS, both)
        yield from ((op_cases.static_step, sized(dim, distribution=distribution)) for dim, distribution in dims)
    elif op.startswith("update "):
        build = partial(op_cases.update, rule=op.removeprefix("update "))
        yield from (
            (build, sized(dim, distribution=distribution)) for dim, distribution in itertools.product(DIMS, both)
        )
        yield build, sized(dtype=bf16)
    elif op in ("segment_sum", "padded"):
        build = value_cases.sum_bags if op == "segment_sum" else value_cases.padded
        for dim, length in itertools.product((16, 64), (5, 50)):
            point = sized(dim, bag_length=length, varied=True, num_inputs=4)
            yield build, replace(point, num_bags=max(4, point.num_bags // (4 if length == 50 else 1)))
    elif op in value_cases.FEATURE_OPS:
        yield partial(value_cases.features, op=op), replace(sized(num_inputs=4), bag_length=50)
    elif op == "attention":
        shape = replace(sized(num_inputs=2), num_bags=max(2, int(64 * scale)), bag_length=max(8, int(200 * scale)))
        yield from ((partial(model_cases.attention, kind=kind_), shape) for kind_ in ("jagged", "hstu"))
    else:
        tokens = Point(dim=max(8, int(256 * scale)), num_bags=max(8, int(512 * scale)), num_rows=32_768, num_inputs=2)
        yield model_cases.cross_entropy, tokens


OPS = (
    "find",
    "find_or_insert",
    "unique_ids",
    "gather",
    "pooled",
    *(f"update {rule}" for rule in op_cases.RULES),
    "step",
    "segment_sum",
    "padded",
    *value_cases.FEATURE_OPS,
    "attention",
    "linear_cross_entropy",
)


def run_grid(
    ops: Sequence[str],
    device: torch.device,
    *,
    copy_gb_per_s: float,
    scale: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Return one record per point: op, case, times, share of the copy bandwidth, and the peers' times and shares."""
    records = []
    for op in ops:
        for build, point in points(op, device.type, scale=scale):
            begin = time.monotonic()
            record = {"op": op, **measure(build, point, device, copy_gb_per_s)}
            records.append(record)
            gc.collect()
            say(f"{line_of(record)}   [{time.monotonic() - begin:.0f} s]")
    return records


def measure(build: Build, point: Point, device: torch.device, copy_gb_per_s: float) -> dict[str, Any]:
    """Build, check and time one point; what cannot be run says why under "error"."""
    try:
        work = build(point, device, "triton" if device.type == "cuda" else "auto")
        work.check()
    except (AssertionError, ImportError, ValueError) as error:
        return {"case": point.words, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    runs = {"recis": work.run, **({} if work.once else {**work.peers, **peers.of_op(work.op, point, device)})}
    times, errors = _times(work, runs, device)
    results = {name: _summary(seconds, work, copy_gb_per_s) for name, seconds in times.items()}
    ours = results.pop("recis")
    return {
        "case": work.case,
        "label": point.label if work.case.endswith(point.words) else work.case.removeprefix(work.op).lstrip(" ,:"),
        "dim": point.dim,
        "dtype": str(point.dtype).removeprefix("torch."),
        "distribution": point.distribution,
        "bag_length": point.bag_length,
        **ours,
        "peers": {**results, **errors},
    }


def _times(
    work: Work, runs: Mapping[str, Callable[[int], object]], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Return seconds per call of all that runs, alternated, and what the others died of."""
    turns = {name: itertools.count() for name in runs}
    impls = {name: lambda run=run, turn=turns[name]: run(next(turn)) for name, run in runs.items()}
    errors: dict[str, dict[str, Any]] = {}
    slowest = 0.0
    for name, run in list(impls.items()):
        try:
            run()  # loads, compiles, allocates
            if not work.once:
                slowest = max(slowest, min(alternate({name: run}, 2, str(device))[name]))
        except (RuntimeError, NotImplementedError) as error:
            if name == "recis":
                raise
            errors[name] = {"error": " ".join(str(error).split())[:120]}
            del impls[name]
    rounds = work.num_inputs - 1
    if not work.once:
        rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, SECONDS_PER_IMPL / max(slowest, 1e-6))))
    return alternate(impls, rounds, str(device)), errors


def _summary(seconds: list[float], work: Work, copy_gb_per_s: float) -> dict[str, Any]:
    p20, p50, p80 = (float(value) for value in np.percentile(seconds, [20, 50, 80]))
    gb_per_s = None if work.bytes_moved is None else work.bytes_moved / p50 / 1e9
    return {
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
        "gb_per_s": gb_per_s,
        "share": None if gb_per_s is None else gb_per_s / copy_gb_per_s,
        "items_per_s": work.items / p50,
    }


def line_of(record: Mapping[str, Any]) -> str:
    """Return a record as one line of the printed table."""
    if "error" in record:
        return f"{record['op']}: {record['case']}: {record['error']}"
    share = "" if record["share"] is None else f"  {record['gb_per_s']:6.1f} GB/s = {record['share']:4.0%} of copy"
    others = "".join(
        f"; {name} {peer['p50_ms'] / record['p50_ms']:.2f}x our time"
        if "p50_ms" in peer
        else f"; {name}: {peer['error']}"
        for name, peer in record["peers"].items()
    )
    return f"{record['case']}: {record['p50_ms']:.3f} ms, {rate(record['items_per_s'])}{share}{others}"


def rate(items_per_s: float) -> str:
    """Return items per second in millions or thousands."""
    return f"{items_per_s / 1e6:,.1f} M/s" if items_per_s >= 1e6 else f"{items_per_s / 1e3:,.1f} k/s"
