"""Measure the choices of `recis_kernels.calibration` on this machine: `recis roofline --calibrate`.

A choice with named candidates is made by running a public op under each of them in turn: one that is not built in wins
only if it is faster than the built-in one by more than noise makes it seem (5 %). Costs (the hand-over to a thread) are
measured as such. What concerns a GPU is measured on one and keeps its built-in value elsewhere.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from recis.bench import op_cases, value_cases
from recis.bench.harness import alternate, time_once
from recis.bench.op_cases import Point
from recis_kernels import calibration
from recis_kernels.calibration import BUILT_IN, Calibration
from recis_kernels.dispatch import Impl
from recis_kernels.id_mod import id_mod
from recis_kernels.segment import segment_sum
from recis_kernels.threads import num_threads, run_parts
from recis_kernels.unique_ids import argsort_ids

LEAST_GAIN = 0.05
ROUNDS = 15
_SIZES = tuple(1 << power for power in range(4, 15, 2))  # elements for which numba and torch are compared


def calibrate(device: torch.device, *, say: Callable[[str], None] = print) -> Calibration:
    """Return this machine's table; the choices of the other kind of device are kept from what was measured before."""
    table = replace(
        calibration.of_this_machine(),
        machine=calibration.machine_name(),
        measured_at=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    changes = _on_gpu(device) if device.type == "cuda" else _on_cpu()
    for name, value in changes.items():
        say(f"  {name} = {value} (built in: {getattr(BUILT_IN, name)})")
    return replace(table, **changes)


def _on_cpu() -> dict[str, Any]:
    ids = torch.randint(-(2**63), 2**63 - 1, (120_000,)).numpy()
    return {
        "thread_hand_over_us": hand_over_us(),
        "numba_from_items": numba_from_items(),
        "bucketed_sort_from_ids": pick("bucketed_sort_from_ids", (1 << 14, 1 << 18), lambda: argsort_ids(ids)),
    }


def _on_gpu(device: torch.device) -> dict[str, Any]:
    step = Point(num_bags=16_384, num_inputs=4)
    keys = Point(num_rows=8 << 20, num_bags=1 << 20, bag_length=1, num_inputs=4)
    jobs: Sequence[tuple[str, Sequence[Any], Callable[[], op_cases.Work]]] = (
        ("gather_tile_items", (256, 1024, 2048), lambda: op_cases.pooled(step, device, "triton")),
        ("find_keys_per_program", (64, 128), lambda: op_cases.find_hits(keys, device, "triton")),
        (
            "reduce_duplicates_by",
            ("sort",),
            lambda: op_cases.unique(replace(step, distribution="zipf"), device, "triton"),
        ),
        ("block_items", (512, 2048), lambda: value_cases.features(step, device, "triton", op="id_mod")),
    )
    found = {}
    for name, candidates, build in jobs:
        work, turn = build(), itertools.count()
        work.check()
        found[name] = pick(name, candidates, lambda work=work, turn=turn: work.run(next(turn)), device=device)
    return found


def pick(
    name: str,
    candidates: Sequence[Any],
    run: Callable[[], object],
    *,
    device: torch.device | None = None,
    rounds: int = ROUNDS,
) -> Any:
    """Return the value of a choice under which `run` is fastest, the built-in one unless another gains more than 5 %."""
    built_in = getattr(BUILT_IN, name)
    impls = {str(value): partial(_under, replace(BUILT_IN, **{name: value}), run) for value in (built_in, *candidates)}
    for timed in impls.values():  # compiles
        timed()
    times = {key: float(np.median(seconds)) for key, seconds in alternate(impls, rounds, str(device or "cpu")).items()}
    best = min((built_in, *candidates), key=lambda value: times[str(value)])
    return best if times[str(best)] < (1 - LEAST_GAIN) * times[str(built_in)] else built_in


def _under(table: Calibration, run: Callable[[], object]) -> object:
    with calibration.use(table):
        return run()


def hand_over_us(rounds: int = 300) -> float:
    """Return the microseconds that giving one part of a loop to another thread adds; built in where one thread is all."""
    if num_threads() < 2:
        return BUILT_IN.thread_hand_over_us

    def nothing(start: int, stop: int) -> None:
        del start, stop

    alone, shared = [(0, 1)], [(0, 1), (1, 2)]
    run_parts(nothing, shared)  # starts the worker
    seconds = [
        time_once(lambda: run_parts(nothing, shared), "cpu") - time_once(lambda: run_parts(nothing, alone), "cpu")
        for _ in range(rounds)
    ]
    return round(min(max(float(np.median(seconds)) * 1e6, 1.0), 1000.0), 1)


def numba_from_items(rounds: int = 31) -> int:
    """Return from how many elements on numba's loops are no slower than torch's, over two ops that have both."""
    for size in _SIZES:
        ratios = []
        for op in (_sums, _remainders):
            impls = {impl: op(size, impl) for impl in ("numba", "torch")}
            for run in impls.values():
                run()
            times = {
                name: float(np.median([time_once(run, "cpu") for _ in range(rounds)])) for name, run in impls.items()
            }
            ratios.append(times["numba"] / times["torch"])
        if float(np.prod(ratios)) <= (1 + LEAST_GAIN) ** 2:
            return 0 if size == _SIZES[0] else size
    return _SIZES[-1]


def _sums(size: int, impl: Impl) -> Callable[[], object]:
    values, offsets = torch.randn(max(1, size // 4), 4), torch.tensor([0, max(1, size // 4)])
    return lambda: segment_sum(values, offsets, impl=impl)


def _remainders(size: int, impl: Impl) -> Callable[[], object]:
    ids = torch.randint(2**62, (size,))
    return lambda: id_mod(ids, [0, size], [1009], impl=impl)
