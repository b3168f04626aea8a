"""The benchmark table of a GPU: each job checked once, then timed against the copy bandwidth of the same run.

    python -m recis.bench.gpu_cases find --json OUT.json [--device cuda] [--size full|small]

Times come from events on the device, over inputs that together are larger than its cache. Calls are queued behind a
pause of the device, so that they are measured back to back and not the host's hand that starts them; a call that waits
for the device (a host sync) shows in its own time, and is counted. Prints and writes one JSON object per case; a case
whose op has no Triton version yet, or that fails, says so in place of numbers.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.bench import model_cases, op_cases, peers, table_cases, value_cases
from recis.bench.harness import copy_gb_per_s, device_name
from recis.bench.inputs import draw_rows, filled_blocks, filled_index
from recis.bench.op_cases import Point, Work
from recis_kernels.dispatch import Impl
from recis_kernels.embedding_bag import row_gather
from recis_kernels.hash_index import find
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.row_blocks import RowLayout
from recis_kernels.sparse_update import PendingLookup, RowGrad, fused_update_flags
from recis_kernels.unique_ids import unique_ids_padded

WARM_UP = 3
ROUNDS = 30
PAUSE_CYCLES = 20_000_000  # about 10 ms: longer than the host takes to queue one round

Build = Callable[[Point, torch.device, Impl], Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """One job of the table and what it must reach.

    Attributes:
        least_share: of the copy bandwidth measured in the same run.
        least_items_per_s, most_ms: the other forms of a target.
        small: changes to `full` for the sanitizer and for machines without a GPU.
    """

    name: str
    build: Build
    full: Point
    small: Mapping[str, Any]
    least_share: float | None = None
    least_items_per_s: float | None = None
    most_ms: float | None = None


_SMALL = {"num_rows": 400, "num_bags": 12, "bag_length": 5, "num_inputs": 2}
_STEP = Point(num_rows=2_000_000, num_bags=65_536, bag_length=20)
_DYNAMIC = Point(dim=128, distribution="power", bag_length=1, num_bags=1_048_570, num_rows=4_000_000, num_inputs=4)


def dynamic_step(
    point: Point, device: torch.device, impl: Impl = "auto", *, train: bool = True, deterministic: bool = False
) -> Work:
    """DynamicEmb's published workload on known ids: de-duplicate, find (to train: find or insert), gather, Adam.

    The number of distinct ids stays on the device: arrays are as long as the batch, and rows beyond that number are -1.
    Least bytes: 8 + 4 D per position and the row of each distinct id in, 4 D per position out; an update reads the
    upstream row of each position and moves weight, m and v of each distinct row both ways.
    """
    rule, numbers, states = op_cases.RULES["adam"]
    layout = RowLayout(point.dim, dtype=point.dtype, state=tuple((name, point.dim) for name in states))
    index, ids = filled_index(point.num_rows, device, load=point.load)
    blocks = filled_blocks(layout, ids.numel(), device)
    num_ids = point.num_bags * point.bag_length
    picked = [draw_rows(point.distribution, ids.numel(), num_ids, seed, device) for seed in range(point.num_inputs)]
    batches = [ids[rows] for rows in picked]
    offsets = torch.arange(num_ids + 1, device=device)
    upstream = torch.full((num_ids, point.dim), 1e-3, device=device)
    allocator = RowAllocator(ids.numel(), device=device)
    scalars, places = torch.tensor([numbers], dtype=torch.float64), torch.arange(num_ids, device=device)

    def look_up(n: int) -> tuple[Any, Tensor, Tensor]:
        unique = unique_ids_padded(batches[n % len(batches)], impl=impl)
        if train:
            more = {"num_ids": unique.num_unique, "deterministic": deterministic, "impl": impl}
            rows, _ = find_or_insert_rows(index, unique.ids, 0, allocator, **more)
        else:
            rows = torch.where(places < unique.num_unique, find(index, unique.ids, impl=impl), -1)
        return unique, rows, row_gather(blocks, rows, unique.inverse, impl=impl)

    def run(n: int) -> object:
        unique, rows, out = look_up(n)
        if not train:
            return out
        view = RowGrad(unique.inverse, offsets, num_ids, per_position=True, grad=upstream)
        lookup = PendingLookup(rows, unique.segments, unique.counts, [view])
        more: dict[str, Any] = {"step": n + 1, "deterministic": deterministic, "impl": impl}
        return fused_update_flags(blocks, [lookup], rule, scalars, **more)

    def check() -> None:
        few = picked[0][: op_cases.CHECKED]
        want = blocks.read(few, ("weight",))["weight"]
        assert look_up(0)[2][: few.numel()].equal(want)
        if train:
            run(0)
            assert not blocks.read(few, ("weight",))["weight"].equal(want)

    num_distinct = sum(batch.unique().numel() for batch in batches) // len(batches)
    forward = num_ids * (16 + 4 * point.dim) + num_distinct * (32 + 4 * point.dim)
    backward = num_ids * 4 * point.dim + num_distinct * 24 * point.dim
    return Work(
        case=f"{'train' if train else 'eval'}{', deterministic' if deterministic else ''}, {point.distribution} law, "
        f"{num_ids:,} ids, {num_distinct:,} distinct, D={point.dim}, Adam",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=forward + (backward if train else 0),
        items=num_ids,
    )


def _embedding_cases() -> list[GpuCase]:
    slots = Point(num_rows=64 << 20, num_bags=1 << 20, bag_length=1, num_inputs=8)
    find_case = partial(GpuCase, build=op_cases.find_hits, small=_SMALL, least_items_per_s=3.5e9)
    cases = [
        find_case(name="find", full=slots),
        find_case(name="find-load-75", full=replace(slots, num_rows=96 << 20, load=0.75)),
        GpuCase(
            name="find_or_insert",
            build=op_cases.insert_new,
            full=replace(slots, num_inputs=20),
            small=_SMALL,
            least_items_per_s=1.1e9,
        ),
    ]
    for dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for distribution in ("uniform", "zipf"):
                point = replace(_STEP, dim=dim, dtype=dtype, distribution=distribution, bag_length=50, varied=True)
                name = f"pooled-D{dim}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}-{distribution}"
                cases.append(
                    GpuCase(name=name, build=op_cases.pooled, full=point, small=_SMALL | {"dim": 7}, least_share=0.65)
                )
    cases += [
        GpuCase(
            name=f"update-{rule.replace(' ', '-')}-D{dim}",
            build=partial(op_cases.update, rule=rule),
            full=replace(_STEP, dim=dim),
            small=_SMALL | {"dim": 7},
            least_share=0.45,
        )
        for rule in op_cases.RULES
        for dim in (64, 128)
    ]
    zipf = replace(_STEP, distribution="zipf")
    cases += [
        GpuCase(
            name=f"update-row-wise-adagrad-D64-zipf{'-deterministic' if deterministic else ''}",
            build=partial(op_cases.update, deterministic=deterministic),
            full=zipf,
            small=_SMALL | {"dim": 7},
        )
        for deterministic in (False, True)
    ]
    cases += [
        GpuCase(
            name=name, build=partial(dynamic_step, **how), full=_DYNAMIC, small=_SMALL | {"dim": 8}, most_ms=most_ms
        )
        for name, how, most_ms in (
            ("dynamic-train", {}, 1.35),
            ("dynamic-eval", {"train": False}, 0.45),
            ("dynamic-train-deterministic", {"deterministic": True}, None),
        )
    ]
    cases += [
        GpuCase(
            name=f"table-step-{name}",
            build=partial(table_cases.table_step, **how),
            full=replace(_STEP, distribution="zipf", num_inputs=4),
            small=_SMALL | {"dim": 8},
        )
        for name, how in (("always", {}), ("max-rows", {"max_rows": 1 << 30}))
    ]
    return cases


def _other_cases() -> list[GpuCase]:
    wide = Point(num_bags=1 << 20, bag_length=10, num_inputs=4)
    cases = [
        GpuCase(
            name=f"features-{op}",
            build=partial(value_cases.features, op=op, num_columns=100),
            full=wide,
            small=_SMALL | {"num_bags": 40},
            least_share=0.6,
        )
        for op in value_cases.FEATURE_OPS
    ]
    cases += [
        GpuCase(name=name, build=build, full=point, small=_SMALL | {"dim": 6}, least_share=share)
        for name, build, point, share in (
            ("step-row-wise-adagrad-D64", op_cases.static_step, replace(_STEP, dim=64), None),
            ("step-row-wise-adagrad-D64-zipf", op_cases.static_step, replace(_STEP, dim=64, distribution="zipf"), None),
            ("gather-D64", op_cases.gather, replace(_STEP, dim=64), None),
            ("gather-D128", op_cases.gather, replace(_STEP, dim=128), None),
            ("unique_ids", op_cases.unique, _STEP, None),
            ("segment_sum", value_cases.sum_bags, replace(_STEP, varied=True, bag_length=50, num_inputs=4), None),
            ("jagged_to_padded", value_cases.padded, replace(_STEP, varied=True, bag_length=50, num_inputs=4), None),
        )
    ]
    cases += [
        GpuCase(name=name, build=build, full=point, small=small) for name, build, point, small in model_cases.TABLE
    ]
    return cases


CASES: Mapping[str, GpuCase] = {case.name: case for case in (*_embedding_cases(), *_other_cases())}


def measure(case: GpuCase, device: torch.device, *, small: bool, impl: Impl = "triton") -> dict[str, Any]:
    """Build a case, check it, time it and its peers, and return what a result file keeps of it.

    Raises:
        AssertionError: the op gives something else than it must.
        ValueError: the op has no version `impl`.
    """
    point = replace(case.full, **case.small) if small else case.full
    work = case.build(point, device, impl)
    work.check()
    rounds = ROUNDS if device.type == "cuda" else 2
    seconds, peak_mib = _timed(work.run, work, device, rounds)
    copy = copy_gb_per_s(str(device), 1024 if device.type == "cuda" else 8)
    p20, p50, p80 = (float(value) for value in np.percentile(seconds, [20, 50, 80]))
    gb_per_s = None if work.bytes_moved is None else work.bytes_moved / p50 / 1e9
    result: dict[str, Any] = {
        "case": work.case,
        "device": device_name(str(device)),
        "rounds": len(seconds),
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": copy,
        "share_of_copy": None if gb_per_s is None else gb_per_s / copy,
        "items_per_s": work.items / p50,
        "peak_mib": peak_mib,
        "peers": _peer_times({**work.peers, **peers.of_op(work.op, point, device)}, work, device, rounds),
        "missing": peers.missing(),
    }
    if device.type == "cuda":
        result |= _host_view(work)
    result["targets"] = _targets(case, result)
    return result


def check(case: GpuCase, device: torch.device, *, small: bool, impl: Impl = "triton") -> dict[str, Any]:
    """Build a case, check it and run each input once: what the sanitizer watches. Raises as measure."""
    work = case.build(replace(case.full, **case.small) if small else case.full, device, impl)
    work.check()
    for n in range(work.num_inputs):
        work.run(n)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"case": work.case, "checked": True}


def _targets(case: GpuCase, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, limit, value, met in (
        ("share_of_copy", case.least_share, result["share_of_copy"], lambda value, limit: value >= limit),
        ("items_per_s", case.least_items_per_s, result["items_per_s"], lambda value, limit: value >= limit),
        ("p50_ms", case.most_ms, result["p50_ms"], lambda value, limit: value <= limit),
    ):
        if limit is not None:
            found[name] = {"target": limit, "met": met(value, limit)}
    return found


def _times(run: Callable[[int], object], work: Work, device: torch.device, rounds: int) -> list[float]:
    """Return seconds per call, every input in turn; those of the warm-up are left out."""
    warm_up = min(WARM_UP, work.num_inputs - 1)
    timed = work.num_inputs - warm_up if work.once else rounds
    for n in range(warm_up):
        run(n)
    if device.type != "cuda":
        seconds = []
        for n in range(warm_up, warm_up + timed):
            begin = time.perf_counter()
            run(n)
            seconds.append(time.perf_counter() - begin)
        return seconds
    torch.cuda.synchronize()
    torch.cuda._sleep(PAUSE_CYCLES)
    events = []
    for n in range(warm_up, warm_up + timed):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(n)
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def _timed(
    run: Callable[[int], object], work: Work, device: torch.device, rounds: int
) -> tuple[list[float], float | None]:
    """Return seconds per call and, on a GPU, the most memory the calls took beyond what was there, in MiB."""
    if device.type != "cuda":
        return _times(run, work, device, rounds), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _times(run, work, device, rounds)
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20


def _peer_times(
    runs: Mapping[str, Callable[[int], object]], work: Work, device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            seconds, peak_mib = _timed(run, work, device, rounds)
            found[name] = {"p50_ms": float(np.median(seconds)) * 1e3, "peak_mib": peak_mib}
        except (RuntimeError, NotImplementedError) as error:  # a peer that lacks this dtype or device
            found[name] = {"error": " ".join(str(error).split())[:200]}
    return found


def _host_view(work: Work) -> dict[str, Any]:
    """Return how one call looks from the host: time to queue it, kernels started, and waits for the device."""
    if work.once:
        return {}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work.run(0)
    queue_ms = (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work.run(1)
        torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(item.message) for item in caught)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work.run(2)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
    return {"queue_ms": queue_ms, "host_syncs": syncs, "launches": launches}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named cases and write one JSON object {case: result}; exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m recis.bench.gpu_cases", description="Benchmarks of single kernels."
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: seconds, for the sanitizer")
    parser.add_argument("--check-only", action="store_true", help="compare and run, time nothing")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    results: dict[str, Any] = {}
    failed, run = False, check if args.check_only else measure
    for name in args.cases or CASES:
        try:
            results[name] = run(CASES[name], torch.device(args.device), small=args.size == "small")
        except AssertionError as error:
            failed = True
            results[name] = {"error": f"wrong result: {' '.join(str(error).split())[:500]}"}
        except (ImportError, ValueError) as error:  # an op without a Triton version says so with a ValueError
            if "not available" not in str(error) and not isinstance(error, ImportError):
                raise
            results[name] = {"missing": " ".join(str(error).split())[:200]}
        print(json.dumps({name: results[name]}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
