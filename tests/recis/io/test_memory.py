"""The memory limit: what is planned, what does not fit, and what the process really holds on a larger set of files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from io_data import make_config, read_steps, rows_table

from recis.errors import ConfigError
from recis.io import Ids, Reader
from recis.io.memory import MIN_CHUNK_ROWS, plan_memory
from recis.io.source import FileSource, bytes_per_row


def test_wide_open_lanes_do_not_fit(tmp_path):
    table = pa.table({f"c{k}": np.random.default_rng(k).integers(0, 2**40, 20_000) for k in range(8)})
    for number in range(8):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    columns = tuple(Ids(f"c{k}") for k in range(8))
    with pytest.raises(
        ConfigError, match=r"reading needs about (\d+) MiB \(8 open units .*memory_limit_mib=6; set .* or less"
    ):
        Reader(make_config(tmp_path, columns=columns, num_lanes=8, memory_limit_mib=6))
    with pytest.raises(ConfigError) as caught:
        Reader(make_config(tmp_path, columns=columns, num_lanes=8, memory_limit_mib=6))
    ways = re.search(r"memory_limit_mib=(\d+) or num_lanes=(\d+) or less", str(caught.value))
    assert ways is not None
    Reader(make_config(tmp_path, columns=columns, num_lanes=8, memory_limit_mib=int(ways[1]))).close()
    Reader(make_config(tmp_path, columns=columns, num_lanes=int(ways[2]), memory_limit_mib=6)).close()


def test_shuffle_buffers_and_batches_that_do_not_fit(tmp_path):
    pq.write_table(rows_table(0, 1000), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"memory_limit_mib=1; set memory_limit_mib=\d+ or a smaller shuffle_rows"):
        Reader(make_config(tmp_path, shuffle_rows=4_000_000, memory_limit_mib=1))
    with pytest.raises(ConfigError, match=r"set memory_limit_mib=\d+ or a smaller batch_size"):
        Reader(make_config(tmp_path, batch_size=4_000_000, memory_limit_mib=1))


def test_a_tight_limit_makes_chunks_and_prefetch_smaller_and_changes_no_order(tmp_path):
    for number in range(4):
        pq.write_table(rows_table(number * 20_000, 20_000), tmp_path / f"{number}.parquet", row_group_size=5000)
    roomy = make_config(tmp_path, batch_size=8000, prefetch_batches=4)
    tight = make_config(tmp_path, batch_size=8000, prefetch_batches=4, memory_limit_mib=4)
    plans = []
    for config in (roomy, tight):
        source = FileSource(config)
        lanes = [[number] for number in range(4)]
        plans.append(plan_memory(config, source, lanes, step_rows=8000, row_bytes=bytes_per_row(source)))
    assert plans[0].prefetch_steps == 4
    assert plans[1].prefetch_steps < 4
    assert MIN_CHUNK_ROWS <= plans[1].chunk_rows < plans[0].chunk_rows
    assert read_steps(tight) == read_steps(roomy)


MEASURE = """
import sys
import pyarrow.parquet
from recis.io import DataConfig, Ids, Reader

def resident_mib(key="VmRSS"):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

def read(folder, limit):
    config = DataConfig(paths=(folder,), format="parquet", columns=tuple(Ids(f"c{k}") for k in range(8)),
                        batch_size=1024, num_lanes=4, memory_limit_mib=limit, shuffle_rows=8192)
    with Reader(config) as reader:
        return sum(batch.num_samples for batch in reader)

read(sys.argv[1], 40)          # libraries are loaded on first use: that is not the reader's memory
before = resident_mib()
rows = read(sys.argv[2], 40)
print(rows, resident_mib("VmHWM") - before)
"""


def test_a_file_ten_times_the_limit_reads_within_it(tmp_path):
    rng = np.random.default_rng(0)
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    table = pa.table({f"c{k}": rng.integers(0, 2**62, 20_000) for k in range(8)})
    pq.write_table(table, small / "a.parquet", row_group_size=10_000)
    with pq.ParquetWriter(large / "a.parquet", table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(336):
            writer.write_table(table, row_group_size=20_000)
    assert sum(path.stat().st_size for path in large.iterdir()) > 10 * 40 * 2**20
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(shown[0]) == 336 * 20_000
    assert float(shown[1]) < 40, f"held {shown[1]} MiB under a limit of 40"
