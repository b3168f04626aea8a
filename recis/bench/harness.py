"""Time several implementations of one job side by side, so that a drifting machine cannot favour one of them.

`compare` is what every file in `benchmarks/` calls after it has checked that all implementations agree. Each round runs
every implementation once, with a pause between them in which another library's OpenMP workers stop spinning. Medians and
the 20th and 80th percentiles go into pytest-benchmark's `extra_info`, from where `recis bench report` reads them.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from recis.bench.stored import fresh

MIN_ROUNDS = 30
MAX_SPREAD = 1.5  # p80 / p20 of our own run; above it the machine was busy and the run is repeated
MAX_ATTEMPTS = 3
SETTLE_S = 0.005  # OpenMP workers spin for some milliseconds after a region; the next implementation needs their core
WARM_UP_ROUNDS = 3


def compare(
    benchmark: Any,
    *,
    case: str,
    ours: str,
    impls: Mapping[str, Callable[[], object]],
    bytes_moved: int | None = None,
    items: int | None = None,
    missing: Sequence[str] = (),
    targets: Mapping[str, float] | None = None,
    rounds: int = MIN_ROUNDS,
    calls: int = 1,
    device: str = "cpu",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time all `impls`, alternated; pytest-benchmark times `ours`. Returns what was stored in `benchmark.extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what was run, with its sizes.
        ours: the key of `impls` that the others are compared with.
        impls: name -> function without arguments; each does the whole job once.
        bytes_moved: least number of bytes the job must move, for gb_per_s and share_of_copy.
        items: units of work in one call, for items_per_s.
        missing: names of peers that are not installed here.
        targets: peer -> least ratio p50_peer / p50_ours; "items_per_s" -> least rate of ours.
        rounds: at least this many; fewer than 30 only for jobs that take seconds, and the file shows it.
        calls: how often an implementation runs in its turn of a round; times are those of one call. More than 1 for jobs
            of microseconds, of which a single call after a pause measures how fast the core wakes.

    Raises:
        ValueError: `ours` is not among `impls`.
    """
    if ours not in impls:
        raise ValueError(f"ours={ours!r} must be one of impls {sorted(impls)}")
    if calls > 1:
        impls = {name: partial(_repeated, run, calls) for name, run in impls.items()}
    for _ in range(WARM_UP_ROUNDS):
        for run in impls.values():
            run()
    times: dict[str, list[float]] = {}
    attempts = 0
    while attempts < MAX_ATTEMPTS:
        attempts += 1
        times = alternate(impls, rounds, device)
        if _spread(times[ours]) <= MAX_SPREAD:
            break
    # pytest-benchmark keeps its own record of ours; the peers run in each round's set-up, so that its rounds are alternated too
    benchmark.pedantic(impls[ours], setup=partial(_peers_once, impls, ours, device), rounds=5, iterations=1)
    return keep(
        benchmark,
        case=case,
        ours=ours,
        seconds={name: [turn / calls for turn in turns] for name, turns in times.items()},
        bytes_moved=bytes_moved,
        items=items,
        missing=missing,
        targets=targets,
        device=device,
        extra={"rounds": rounds, "calls": calls, "attempts": attempts, **(extra or {})},
    )


def keep(
    benchmark: Any,
    *,
    case: str,
    ours: str,
    seconds: Mapping[str, Sequence[float]],
    bytes_moved: int | None = None,
    items: int | None = None,
    missing: Sequence[str] = (),
    targets: Mapping[str, float] | None = None,
    device: str = "cpu",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Store the times of jobs that a benchmark ran itself, in the form of `compare`; returns what was stored.

    For jobs that cannot be repeated at will: a cold cache, requests of many clients. Give pytest-benchmark a run too.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what was run, with its sizes.
        ours: the key of `seconds` that the others are compared with.
        seconds: name -> seconds of each run.
        bytes_moved: as `compare`.
        items: as `compare`.
        missing: as `compare`.
        targets: as `compare`.
        device: as `compare`.
        extra: further figures by name.

    Raises:
        ValueError: `ours` is not among `seconds`, or one of them has no run.
    """
    if ours not in seconds or not all(map(len, seconds.values())):
        raise ValueError(f"seconds must hold runs of {ours!r} and of each peer; got {sorted(seconds)}")
    results = {name: _summary(list(runs), bytes_moved, items, device) for name, runs in seconds.items()}
    p50_ms = {name: float(np.median(runs)) * 1e3 for name, runs in seconds.items()}
    info: dict[str, Any] = {
        "case": case,
        "ours": ours,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "copy_gb_per_s": round(copy_gb_per_s(device), 2) if bytes_moved is not None else None,
        "spread": round(_spread(list(seconds[ours])), 3),
        "results": results,
        "ratio_to": {name: round(p50 / p50_ms[ours], 3) for name, p50 in p50_ms.items() if name != ours},
        "missing": list(missing),
        "targets": dict(targets or {}),
        **(extra or {}),
    }
    benchmark.extra_info.update(info)
    return info


def _repeated(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def at_threads(num_threads: int, run: Callable[[], object]) -> Callable[[], object]:
    """Return `run` with torch's thread count set to num_threads for its duration: a peer at its own best count."""

    def timed() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return timed


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model with the number of cores this process may use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = "CPU"
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        model = "CPU (model unknown: /proc/cpuinfo cannot be read)"
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


@cache
def copy_gb_per_s(device: str = "cpu", size_mib: int = 256) -> float:
    """Return this machine's copy bandwidth: bytes read + written per second of a large copy, median of 9.

    Measured here and now; of a CPU, what `recis roofline` measured today on the quiet machine is taken where it is fresh.
    """
    stored = None if device.startswith("cuda") else fresh("cpu")
    if stored is not None:
        return stored["copy_gb_per_s"]
    return measure_copy(device, size_mib)


def measure_copy(device: str, size_mib: int) -> float:
    """Measure the copy bandwidth now."""
    source = torch.ones(size_mib * 2**20 // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = [time_once(lambda: target.copy_(source), device) for _ in range(11)]
    return 2 * source.numel() * 4 / float(np.median(seconds[2:])) / 1e9


def alternate(impls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each call of each implementation: every round runs all of them, in a shifted order."""
    times: dict[str, list[float]] = {name: [] for name in impls}
    names = list(impls)
    for round_index in range(rounds):
        shift = round_index % len(names)  # no implementation always follows the same neighbour
        for name in names[shift:] + names[:shift]:
            time.sleep(SETTLE_S)
            times[name].append(time_once(impls[name], device))
    return times


def _peers_once(impls: Mapping[str, Callable[[], object]], ours: str, device: str) -> None:
    for name, run in impls.items():
        if name != ours:
            time_once(run, device)
    time.sleep(SETTLE_S)


def time_once(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one call; on a GPU by events."""
    if device.startswith("cuda"):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _spread(seconds: list[float]) -> float:
    p20, p80 = np.percentile(seconds, [20, 80])
    return float(p80 / p20)


def _summary(seconds: list[float], bytes_moved: int | None, items: int | None, device: str) -> dict[str, float | None]:
    p20, p50, p80 = (float(v) for v in np.percentile(seconds, [20, 50, 80]))
    gb_per_s = bytes_moved / p50 / 1e9 if bytes_moved is not None else None
    return {
        "p20_ms": round(p20 * 1e3, 4),
        "p50_ms": round(p50 * 1e3, 4),
        "p80_ms": round(p80 * 1e3, 4),
        "gb_per_s": round(gb_per_s, 3) if gb_per_s is not None else None,
        "share_of_copy": round(gb_per_s / copy_gb_per_s(device), 3) if gb_per_s is not None else None,
        "items_per_s": round(items / p50, 1) if items is not None else None,
    }
