"""Speed and memory of reading: Parquet files with 20 id columns into batches of tensors.

    make bench, or: pytest benchmarks/test_io.py --benchmark-json=out.json       (-k "not 5_gib" leaves the large set out)

Peers: plain pyarrow batches (decoded, but neither joined over files nor tensors), pyarrow batches turned into the same
tensors by hand, and Hugging Face datasets. `datasets` reads its own uncompressed, memory-mapped copy of the data, which is
made before the clock starts: its Arrow tables cost next to nothing, its tensors are what a training loop would use.
Memory is the largest resident set of a process of its own that reads a generated set of files once.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.bench.harness import compare, device_name
from recis.io import DataConfig, Ids, Reader, from_hf

SINGLE, LISTS = 12, 8
NAMES = (*(f"single_{k}" for k in range(SINGLE)), *(f"list_{k}" for k in range(LISTS)))
COLUMNS = tuple(Ids(name) for name in NAMES)
BATCH_SIZE = 4096
THREADS = 2
MEMORY_LIMIT_MIB = 512
RESIDENT_GOAL_MIB = 1000
HAS_DATASETS = importlib.util.find_spec("datasets") is not None


def id_table(num_rows: int, seed: int = 0) -> pa.Table:
    """12 columns of one id and 8 of up to four ids per row: 28 ids per row in the mean."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.integers(0, 2**40, num_rows) for name in NAMES[:SINGLE]}
    for name in NAMES[SINGLE:]:
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, num_rows))]).astype(np.int32)
        columns[name] = pa.ListArray.from_arrays(offsets, rng.integers(0, 2**40, offsets[-1]))
    return pa.table(columns)


def write_set(folder: Path, *, row_groups: int, rows_per_group: int, num_files: int) -> int:
    """Write files of equal row groups until there are `row_groups`; returns their bytes."""
    table = id_table(rows_per_group)
    for number in range(num_files):
        with pq.ParquetWriter(folder / f"{number:03d}.parquet", table.schema, use_dictionary=False) as writer:
            for _ in range(len(range(number, row_groups, num_files))):
                writer.write_table(table, row_group_size=rows_per_group)
    return sum(path.stat().st_size for path in folder.iterdir())


def config_for(folder: Path | str, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {
        "paths": (str(folder),),
        "format": "parquet",
        "columns": COLUMNS,
        "batch_size": BATCH_SIZE,
        "num_lanes": 8,
        "threads": THREADS,
        "memory_limit_mib": MEMORY_LIMIT_MIB,
    }
    return DataConfig(**{**fields, **changes})


def with_recis(folder: Path | str, shuffle_rows: int = 0) -> tuple[int, int]:
    """(rows, ids) delivered as tensors."""
    rows = ids = 0
    with Reader(config_for(folder, shuffle_rows=shuffle_rows)) as reader:
        for batch in reader:
            rows += batch.num_samples
            ids += sum(batch.jagged(name).num_values for name in NAMES)
    return rows, ids


def with_pyarrow(folder: Path | str, *, tensors: bool) -> tuple[int, int]:
    """(rows, ids) in plain batches, file after file; as values and offsets where `tensors`."""
    rows = ids = 0
    for path in sorted(Path(folder).iterdir()):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH_SIZE, columns=list(NAMES), use_threads=True):
            rows += batch.num_rows
            for name in NAMES:
                column = batch.column(name)
                if not pa.types.is_list(column.type):
                    values = torch.from_dlpack(column) if tensors else column
                    ids += values.numel() if isinstance(values, torch.Tensor) else len(values)
                    continue
                flat = column.flatten()
                if tensors:
                    torch.from_dlpack(flat)
                    torch.from_dlpack(column.offsets).long()
                ids += len(flat)
    return rows, ids


def with_datasets(dataset: Any, style: str) -> tuple[int, int]:
    """(rows, ids) through Hugging Face datasets."""
    rows = ids = 0
    for batch in dataset.with_format(style).iter(batch_size=BATCH_SIZE):
        columns = [batch[name] for name in NAMES]
        rows += len(columns[0])
        if style == "arrow":
            ids += sum(len(c.combine_chunks().flatten()) if pa.types.is_list(c.type) else len(c) for c in columns)
        else:
            ids += sum(c.numel() if isinstance(c, torch.Tensor) else sum(len(row) for row in c) for c in columns)
    return rows, ids


def load_with_datasets(folder: Path, cache: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(folder.iterdir())]
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)


@pytest.mark.parametrize("shuffle_rows", [0, 32768], ids=["in_order", "shuffled"])
def test_parquet_to_batches(benchmark, tmp_path, shuffle_rows):
    folder = tmp_path / "set"
    folder.mkdir()
    num_bytes = write_set(folder, row_groups=8, rows_per_group=16384, num_files=4)
    impls: dict[str, Callable[[], object]] = {
        "recis": partial(with_recis, folder, shuffle_rows),
        "pyarrow batches": partial(with_pyarrow, folder, tensors=False),
        "pyarrow to torch": partial(with_pyarrow, folder, tensors=True),
    }
    with tempfile.TemporaryDirectory() as cache:
        if HAS_DATASETS:
            impls["datasets, arrow tables"] = partial(with_datasets, load_with_datasets(folder, cache), "arrow")
        counts = {name: run() for name, run in impls.items()}
        assert len(set(counts.values())) == 1, counts
        rows, ids = with_recis(folder)
        compare(
            benchmark,
            case=f"{rows} rows, 20 id columns, {ids} ids, {num_bytes >> 20} MiB, {THREADS} threads",
            ours="recis",
            impls=impls,
            items=ids,
            missing=() if HAS_DATASETS else ("datasets",),
            targets={"items_per_s": 1e6 * THREADS},
        )


@pytest.mark.skipif(not HAS_DATASETS, reason="needs the extra hf")
def test_datasets_to_tensors(benchmark, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(folder, row_groups=1, rows_per_group=2048, num_files=1)
    with tempfile.TemporaryDirectory() as cache:
        dataset = load_with_datasets(folder, cache)

        def ours() -> tuple[int, int]:
            rows = ids = 0
            with from_hf(dataset, COLUMNS, batch_size=BATCH_SIZE, num_lanes=1, threads=THREADS) as reader:
                for batch in reader:
                    rows += batch.num_samples
                    ids += sum(batch.jagged(name).num_values for name in NAMES)
            return rows, ids

        peer = partial(with_datasets, dataset, "torch")
        assert ours() == peer()
        impls = {"recis.io.from_hf": ours, "datasets, torch format": peer}
        compare(
            benchmark,
            case="2048 rows of a map-style dataset, 20 id columns",
            ours="recis.io.from_hf",
            impls=impls,
            items=ours()[1],
            rounds=10,
        )


READ_ONCE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_io

def resident_mib(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

before, begin = resident_mib("VmRSS"), time.perf_counter()
if sys.argv[2] == "recis":
    counted = test_io.with_recis(sys.argv[3], 65536)
elif sys.argv[2] == "pyarrow":
    counted = test_io.with_pyarrow(sys.argv[3], tensors=True)
else:
    import datasets
    files = [str(path) for path in sorted(Path(sys.argv[3]).iterdir())]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    counted = test_io.with_datasets(stream, "arrow")
seconds = time.perf_counter() - begin
print(json.dumps({"counted": counted, "seconds": seconds, "before_mib": before, "peak_mib": resident_mib("VmHWM")}))
"""


def read_once(impl: str, folder: Path) -> dict[str, Any]:
    """What a fresh process needs to read the folder: seconds, and resident memory before and at its highest."""
    here = Path(__file__).parent
    search = [str(here.parent), str(here.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-c", READ_ONCE, str(here), impl, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("gib", [0.2, 5.0], ids=["small", "5_gib"])
def test_resident_memory(benchmark, tmp_path, gib):
    folder = tmp_path / "set"
    folder.mkdir()
    rows_per_group = 131072
    group_bytes = rows_per_group * (SINGLE * 8 + LISTS * 2 * 8)
    row_groups = max(2, round(gib * 2**30 / group_bytes))
    num_bytes = write_set(folder, row_groups=row_groups, rows_per_group=rows_per_group, num_files=min(8, row_groups))
    names = ["recis", "pyarrow", *(["datasets, streamed"] if HAS_DATASETS else [])]
    read = {name: read_once(name, folder) for name in names if name != "recis"}
    read["recis"] = benchmark.pedantic(read_once, args=("recis", folder), rounds=1, iterations=1)
    assert len({tuple(result["counted"]) for result in read.values()}) == 1
    assert read["recis"]["peak_mib"] < RESIDENT_GOAL_MIB, read["recis"]
    assert read["recis"]["peak_mib"] - read["recis"]["before_mib"] < MEMORY_LIMIT_MIB, read["recis"]
    rows, ids = read["recis"]["counted"]
    milliseconds = {name: result["seconds"] * 1e3 for name, result in read.items()}
    benchmark.extra_info.update(
        {
            "case": f"{num_bytes / 2**30:.1f} GiB, {rows} rows, {ids} ids, each read once by a process of its own",
            "ours": "recis",
            "device": device_name("cpu"),
            "threads": THREADS,
            "load_average": round(os.getloadavg()[0], 2),
            "rounds": 1,
            "attempts": 1,
            "spread": 1.0,
            "results": {name: _once(value, num_bytes, ids) for name, value in milliseconds.items()},
            "ratio_to": {n: round(ms / milliseconds["recis"], 3) for n, ms in milliseconds.items() if n != "recis"},
            "missing": [] if HAS_DATASETS else ["datasets"],
            "targets": {"items_per_s": 1e6 * THREADS},
            "memory_limit_mib": MEMORY_LIMIT_MIB,
            "peak_resident_mib": {name: round(result["peak_mib"], 1) for name, result in read.items()},
            "resident_before_mib": {name: round(result["before_mib"], 1) for name, result in read.items()},
        }
    )


def _once(milliseconds: float, num_bytes: int, ids: int) -> dict[str, float | None]:
    """The results of a single run, in the form of the harness."""
    spread = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), round(milliseconds, 1))
    rates = {"gb_per_s": round(num_bytes / milliseconds / 1e6, 3), "items_per_s": round(ids / milliseconds * 1e3, 1)}
    return {**spread, **rates, "share_of_copy": None}
