"""The main job on one page: DeepFM on dynamic tables, on a generated click log whose best possible AUC is known.

Trains on all days of the log but the last, tests on the last, where a part of the users and items was never seen before.
Tables admit ids on their second sighting and free rows that nobody has seen for a while. `run_demo` also kills a smaller
run of the same recipe with SIGKILL, resumes it, and compares every file of its last checkpoint with an undisturbed run's.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import torch

from recis.checkpoint import list_checkpoints, read_manifest
from recis.embedding import AfterSightings, TableConfig, TtlSteps
from recis.errors import ConfigError, RecisError
from recis.features import Cross, FeatureSpec, Hash, Log
from recis.io import DataConfig, Dense, Group, Ids, Label, Strings
from recis.metrics import Calibration, ExactAuc, Gauc, LogLoss, Ne
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam, RowOptimizer
from recis.recipes.click_log import ClickLogConfig, generate
from recis.trainer import DenseAdamW, TrainConfig, Trainer
from recis.trainer.report import write_report

COLUMNS = (
    Ids("user_id"),
    Ids("item_id"),
    Ids("category"),
    Strings("brand"),
    Strings("device"),
    Ids("hour"),
    Dense("price"),
    Dense("item_age_days"),
    Ids("history_items"),
    Ids("history_categories"),
    Label("click"),
    Group("user_group", source="user_id"),
)
FEATURES = (
    FeatureSpec(name="user", kind="sparse", source="user_id"),
    FeatureSpec(name="item", kind="sparse", source="item_id"),
    FeatureSpec(name="category", kind="sparse"),
    FeatureSpec(name="brand", kind="sparse", ops=(Hash(),)),
    FeatureSpec(name="device", kind="sparse", ops=(Hash(),)),
    FeatureSpec(name="hour", kind="sparse"),
    FeatureSpec(name="user_category", kind="sparse", ops=(Cross("user", "category"),)),
    FeatureSpec(name="device_hour", kind="sparse", ops=(Cross("device", "hour"),)),
    FeatureSpec(name="history_items", kind="sparse"),
    FeatureSpec(name="history_categories", kind="sparse"),
    FeatureSpec(name="category_in_history", kind="sparse", ops=(Cross("history_categories", "category"),)),
    FeatureSpec(name="log_price", kind="dense", source="price", ops=(Log(0.01),)),
    FeatureSpec(name="log_age", kind="dense", source="item_age_days", ops=(Log(1.0),)),
    FeatureSpec(name="click", kind="label"),
    FeatureSpec(name="user_group", kind="group"),
)
KILL_STEPS = 60  # length of the two small runs that show exact resume
KILL_AFTER_STEP = 20
GENERATED = "generated.ok"  # written when the log is whole, so that a killed generation is not taken for one


def demo(
    *,
    data: str | None,
    out: Path,
    num_samples: int = 400_000,
    num_users: int = 12_000,
    num_items: int = 6_000,
    text: bool = False,
    seed: int = 0,
) -> TrainConfig:
    """Return the demo's run.

    Args:
        data: a folder with a log that `recis.recipes.click_log` wrote; None generates one in `out/data`.
        out: the run folder.
        num_samples: impressions in the generated log.
        num_users: users that exist at its end.
        num_items: items that exist at its end.
        text: give the items titles that carry signal.
        seed: of the log, the tables and the order of samples.
    """
    log = ClickLogConfig(num_samples=num_samples, num_users=num_users, num_items=num_items, text=text, seed=seed)
    days = log_days(data, out, log)
    train = DataConfig(
        paths=tuple(str(day) for day in days[:-1]),
        format="parquet",
        columns=COLUMNS,
        batch_size=1024,
        num_lanes=8,
        shuffle_rows=65_536,
        seed=seed,
    )
    return TrainConfig(
        name="demo",
        model=DeepFMConfig(
            tables=demo_tables(),
            dense=(DenseInput("log_price"), DenseInput("log_age")),
            hidden=(128, 64),
            seed=seed,
        ),
        train_data=train,
        eval_data=replace(train, paths=(str(days[-1]),), shuffle_rows=0),
        features=FEATURES,
        metrics=(ExactAuc(), Gauc(), LogLoss(), Ne(), Calibration()),
        dense_optimizer=DenseAdamW(lr=2e-3),
        save_every_steps=100,
        log_every_steps=20,
        seed=seed,
        after=print_against_optimum,
    )


def demo_tables() -> tuple[TableConfig, ...]:
    """Return the tables of FEATURES, all of one width."""
    optimizer: RowOptimizer = Adam(lr=1e-3)

    def table(name: str, *features: str, sightings: int = 1, ttl_steps: int | None = None) -> TableConfig:
        return TableConfig(
            name=name,
            features=features or (name,),
            embedding_dim=17,  # one linear weight and 16 factors
            optimizer=optimizer,
            admission=AfterSightings(sightings),
            eviction=() if ttl_steps is None else (TtlSteps(ttl_steps),),
        )

    return (
        table("user", sightings=2, ttl_steps=400),
        table("item", "item", "history_items", sightings=2, ttl_steps=400),
        table("category", "category", "history_categories"),
        table("brand"),
        table("context", "device", "hour", "device_hour"),
        table("user_category", sightings=2, ttl_steps=250),
        table("category_in_history", sightings=2, ttl_steps=400),
    )


def log_days(data: str | None, out: Path, log: ClickLogConfig) -> list[Path]:
    """Return the files of a generated log in the order of time; without `data` one is generated in `out/data`."""
    folder = out / "data" if data is None else Path(data)
    if data is None and not (folder / GENERATED).exists():
        generate(log, folder)
        (folder / GENERATED).write_text("")
    days = sorted(folder.glob("day-*.parquet"))
    if len(days) < 2:
        raise ConfigError(f"--data {folder}: needs at least two files day-NN.parquet; found {len(days)}")
    return days


def print_against_optimum(trainer: Trainer, out: Path | None) -> None:
    """Print the test AUC beside that of the probabilities the clicks were drawn from."""
    optimum = ExactAuc()
    table = pq.read_table(trainer.config.eval_data.paths[0], columns=["click", "true_probability"])
    optimum.update(
        scores=torch.tensor(table["true_probability"].to_numpy()),
        labels=torch.tensor(table["click"].to_numpy()).float(),
    )
    best, ours = optimum.compute(), trainer.state.metrics["auc"]
    print(f"test AUC {ours:.4f}; Bayes-optimal AUC of this test day {best:.4f}; ", end="")
    print(f"share of the way from 0.5: {(ours - 0.5) / (best - 0.5):.1%}")
    for name, table in trainer.tables.items():
        counters = table.counters()
        print(
            f"  table {name}: {counters.size:,} rows; inserted {counters.inserted:,}, "
            f"rejected {counters.rejected:,}, evicted {counters.evicted:,}"
        )


def run_demo(out: Path | None, *, settings: Sequence[str] = ()) -> bool:
    """Train the demo, show that a killed run resumes to equal bytes, write the report; returns whether both held."""
    from recis.runs import start_run

    begin = time.monotonic()
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    print(f"1. generate a click log and train DeepFM on it, in {folder}")
    run = start_run("demo", data=None, out=folder, settings=settings, resume=False)
    run.train()
    print("2. kill a run of the same recipe with SIGKILL, resume it, compare with an undisturbed one")
    equal = show_exact_resume(folder, settings)
    page = write_report(folder)
    print(f"3. report: {page}")
    print(f"   try: recis inspect {folder};  recis eval --run {folder} --data {run.config.eval_data.paths[0]}")
    print(f"done in {time.monotonic() - begin:.0f} s")
    return equal


def show_exact_resume(folder: Path, settings: Sequence[str]) -> bool:
    """Run the recipe twice for 60 steps, once killed and resumed; print and return whether all files are equal."""
    command = [sys.executable, "-m", "recis", "train", "demo", "--data", str(folder / "data")]
    for setting in (*settings, f"max_steps={KILL_STEPS}", "save_every_steps=10", "log_every_steps=1"):
        command += ["--set", setting]
    straight, killed = folder / "exact-resume" / "straight", folder / "exact-resume" / "killed"
    _run([*command, "--out", str(straight)])
    victim = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while victim.poll() is None and _logged_steps(killed) <= KILL_AFTER_STEP:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    at = _logged_steps(killed)
    _run([*command, "--out", str(killed), "--resume"])
    different = differing_parts(killed, straight)
    step = read_manifest(list_checkpoints(killed)[-1]).step
    print(f"   killed at step {at}, resumed, step {step}: ", end="")
    print(f"DIFFERENT: {', '.join(different)}" if different else "every byte equal to the straight run's")
    return not different


def _run(command: list[str]) -> None:
    """Run a command to its end; RecisError with the last lines it printed when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RecisError(f"{' '.join(command[2:])} ended with exit code {done.returncode}: {done.stderr[-1000:]}")


def differing_parts(run: Path, other: Path) -> list[str]:
    """Return what differs between the newest checkpoints of two runs: files by their SHA-256, and the manifest's parts."""
    ours, theirs = (read_manifest(list_checkpoints(folder)[-1]) for folder in (run, other))
    files = [name for name in {*ours.files, *theirs.files} if ours.files.get(name) != theirs.files.get(name)]
    parts = ("step", "seed", "tables", "dense", "reader", "schedules", "metrics", "trainer")
    return sorted(files) + [part for part in parts if getattr(ours, part) != getattr(theirs, part)]


def _logged_steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0
