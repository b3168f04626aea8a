"""Measure what this machine can do, in about ten seconds; with --full, how near each op comes to it.

    recis roofline                    copy, read, gather by row size, random updates, hash find; kept for the benchmarks
    recis roofline --full --out DIR   also every op over its grid, beside the peers that are installed: table, page, picture
    recis roofline --calibrate        also the kernels' choices (see `recis_kernels.calibration`), kept for later runs

The limit that shares refer to is the copy bandwidth of the same run, never a data sheet's.
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recis.bench import grid, peers, probes, stored
from recis.bench.harness import device_name, measure_copy
from recis.bench.inputs import draw_rows, filled_index
from recis.bench.roofline_page import to_html, to_lines, write_picture
from recis.errors import ConfigError
from recis_kernels import calibration
from recis_kernels.hash_index import find
from recis_kernels.threads import num_threads

COPY_MIB = {"cpu": 256, "cuda": 2048}
FIND_IDS = {"cpu": 4 << 20, "cuda": 64 << 20}  # half of the slots: 128 MiB and 2 GiB of them
FIND_KEYS = {"cpu": 1 << 18, "cuda": 1 << 20}
_PACKAGES = ("recis", "torch", "triton", "numba", "fbgemm_gpu", "torchrec")


def measure(device: torch.device, *, scale: float = 1.0) -> dict[str, Any]:
    """Return the machine and its limits, see the head of this file; scale shrinks all buffers, for tests."""
    begin, load_before = time.monotonic(), os.getloadavg()[0]
    kind = device.type
    copy = measure_copy(str(device), max(1, int(COPY_MIB[kind] * scale)))
    read = probes.read_gb_per_s(device, max(1, int(COPY_MIB[kind] * scale)))
    gather = probes.gather_gb_per_s(device, scale=scale)
    what, updates = probes.updates_per_s(device, scale=scale)
    result = {
        "format": stored.FORMAT,
        "version": stored.VERSION,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": calibration.machine_name(),
        "device": device_name(kind),
        "device_type": kind,
        "threads": num_threads(),
        "versions": versions(),
        "copy_gb_per_s": copy,
        "read_gb_per_s": read,
        "gather_gb_per_s": {str(row_bytes): value for row_bytes, value in gather.items()},
        "updates": {"what": what, "per_s": updates},
        "find": measure_find(device, scale=scale),
    }
    return {
        **result,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.monotonic() - begin, 1),
    }


def measure_find(device: torch.device, *, scale: float = 1.0) -> dict[str, Any]:
    """Return keys per second of random hits in an index beyond the cache, at load 0.5."""
    index, ids = filled_index(max(64, int(FIND_IDS[device.type] * scale)), device, load=0.5)
    count = max(8, int(FIND_KEYS[device.type] * scale))
    batches = [ids[draw_rows("uniform", ids.numel(), count, seed, device)] for seed in range(8)]
    turn = iter(range(1 << 30))
    seconds = probes.median_s(lambda: find(index, batches[next(turn) % len(batches)]), device)
    return {"slots": int(index.table[0, 2]), "load": 0.5, "keys_per_s": count / seconds}


def versions() -> dict[str, str]:
    """Return the versions of what was measured and of the peers that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        for package in (name, f"{name.replace('_', '-')}-cpu"):
            try:
                found[name] = version(package)
                break
            except PackageNotFoundError:
                continue
    return found


def run_command(args: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code.

    Raises:
        ConfigError: no GPU for --device cuda, an unknown op, or options that belong to others.
    """
    device = _device(args.device)
    ops = _ops(args.ops)
    for given, needs, option in ((args.ops, args.full, "--full"), (args.calibration, args.calibrate, "--calibrate")):
        if given is not None and not needs:
            raise ConfigError(f"{'--ops' if option == '--full' else '--calibration'} goes with {option}; add it")
    say = partial(print, flush=True, file=sys.stderr if args.json else sys.stdout)
    say(f"{device_name(device.type)}: measuring, about 10 s (the first time longer: kernels are compiled)")
    limits = measure(device)
    path = stored.store(limits, device.type)
    result: dict[str, Any] = {"limits": limits, "stored": str(path)}
    if not args.full:
        for line in to_lines(limits):
            say(line)
        say(f"kept in {path}")
    else:
        result["records"] = grid.run_grid(ops, device, copy_gb_per_s=limits["copy_gb_per_s"], say=say)
        result["missing"] = peers.missing()
        result["load_average_at_end"] = round(os.getloadavg()[0], 2)
        result["files"] = _write(result, args.out or Path("roofline"), say)
    if args.calibrate:
        from recis.bench.calibrate import calibrate

        table = calibrate(device, say=say)
        target = args.calibration or calibration.default_path()
        calibration.save(table, target)
        result["calibration"] = {"stored": str(target), **calibration.to_json(table)}
        say(f"choices kept in {target}; runs with deterministic=False use them")
    if args.json:
        print(json.dumps(result))
    return 1 if any("AssertionError" in record.get("error", "") for record in result.get("records", ())) else 0


def _write(result: dict[str, Any], out: Path, say: Any) -> list[str]:
    """Write JSON, page and picture into a folder and return their paths."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "roofline.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "roofline.html").write_text(to_html(result))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
    files = [str(out / "roofline.json"), str(out / "roofline.html")]
    reason = write_picture(result, out / "roofline.png")
    if reason is None:
        files.append(str(out / "roofline.png"))
    else:
        say(f"no picture: {reason}")
    for line in to_lines(result["limits"]):
        say(line)
    say(f"page: {out / 'roofline.html'}")
    return files


def _device(name: str | None) -> torch.device:
    have = torch.cuda.is_available()
    if name == "cuda" and not have:
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out to measure the CPU")
    return torch.device(name or ("cuda" if have else "cpu"))


def _ops(text: str | None) -> tuple[str, ...]:
    """Return the ops of --ops; "update" means all of them."""
    if text is None:
        return grid.OPS
    chosen = tuple(op for name in text.split(",") for op in grid.OPS if name in (op, op.split()[0]))
    unknown = [name for name in text.split(",") if not any(name in (op, op.split()[0]) for op in grid.OPS)]
    if unknown:
        raise ConfigError(f"--ops: no op {unknown[0]!r}; there are {', '.join(grid.OPS)}")
    return chosen
