"""What the recipes with towers cost on a machine of one's own: preparation, seconds per step, and the whole run they add up to.

    pytest benchmarks/test_recipe_steps.py --benchmark-json=out.json

A recipe's run is its preparation and its steps; evaluation and the ranker of `product_understanding` come on top. The goal is
a run below eight minutes on two cores. `retail_towers` reads the data that RECIS_DATA names.
"""

import math
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recis.bench.harness import keep
from recis.recipes import product_understanding as understanding
from recis.recipes import retail_towers as towers
from recis.trainer import TrainConfig, Trainer

GOAL_S = 8 * 60
WARM_UP, STEPS = 2, 4


def step_seconds(config: TrainConfig) -> list[float]:
    """Return the seconds of some steps of a run, reading included."""
    config = replace(config, max_steps=WARM_UP + STEPS, evaluate=None, after=None)
    times: list[float] = []

    class Clock:
        def on_step_end(self, state) -> None:
            times.append(time.perf_counter())

    Trainer(replace(config, hooks=(Clock(),)), quiet=True).train()
    assert len(times) == WARM_UP + STEPS, f"the data ended after {len(times)} steps"
    return [after - before for before, after in pairwise(times[WARM_UP - 1 :])]


def test_product_understanding(benchmark, tmp_path):
    begun = time.perf_counter()
    config = understanding.product_understanding(data=os.environ.get("RECIS_DATA"), out=tmp_path)
    preparation = time.perf_counter() - begun
    steps = config.epochs * math.ceil(pq.read_metadata(tmp_path / "samples.parquet").num_rows / understanding.BATCH)
    times = step_seconds(config)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    whole = preparation + steps * sum(times) / len(times)
    keep(
        benchmark,
        case=f"product_understanding, {steps} steps of {understanding.BATCH}",
        ours="step",
        seconds={"step": times},
        items=understanding.BATCH,
        extra={"preparation_s": round(preparation, 1), "training_s": round(whole, 1), "goal_s": GOAL_S},
    )
    print(f"\npreparation {preparation:.0f} s, {steps} steps: {whole:.0f} s in all")


def test_retail_towers(benchmark, tmp_path):
    home = os.environ.get("RECIS_DATA")
    if home is None:
        pytest.skip("RECIS_DATA is not set: it names the folder of the public data")
    data = Path(home) / "online_retail" / "transactions.parquet"
    begun = time.perf_counter()
    joint = towers.retail_towers(data=str(data), out=tmp_path)
    ready = towers.prepare(data.resolve(), tmp_path, encoder="auto", hide_weeks=0, days=120)
    preparation = time.perf_counter() - begun
    times = {
        stage: step_seconds(towers.stage_config(ready, stage, epochs=joint.epochs or 1, top_layers=1, seed=0))
        for stage in towers.STAGES
    }
    steps = (joint.epochs or 1) * math.ceil(ready.num_samples / towers.BATCH)
    whole = preparation + steps * sum(sum(own) / len(own) for own in times.values())
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    keep(
        benchmark,
        case=f"retail_towers, four stages of {steps} steps",
        ours="joint",
        seconds=times,
        items=towers.BATCH,
        extra={"preparation_s": round(preparation, 1), "training_s": round(whole, 1), "goal_s": GOAL_S},
    )
    print(f"\npreparation {preparation:.0f} s, {steps} steps of each stage: {whole:.0f} s in all")
