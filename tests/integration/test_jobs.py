"""Jobs of 1 to 8 gloo processes: equal bytes at any world size and across resumes, clean ends, and what faults leave."""

import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, RankDone
from job_recipe import MAX_STEPS
from merged import differences, merged, newest

from recis.checkpoint import list_checkpoints, verify
from recis.errors import ConfigError
from recis.runs import start_run
from recis.trainer.log import read_log

RECIPE = "job_recipe:recipe"


def train(data: Path, out: Path, *settings: str, resume: bool = False) -> list[str]:
    """Return the arguments of the command."""
    chosen = [part for setting in settings for part in ("--set", setting)]
    return ["train", RECIPE, "--data", str(data), "--out", str(out), *chosen, *(["--resume"] if resume else [])]


def ended_well(done: list[RankDone]) -> None:
    """Assert exit code 0 of every rank, and that none of them said anything of its end but rank 0's lines."""
    for rank in done:
        assert rank.code == 0, rank.err
        assert "terminate called" not in rank.err
        assert "Traceback" not in rank.err
    for rank in done[1:]:
        said = [line for line in rank.err.splitlines() if "find_unused_parameters" not in line]  # DDP's advice
        assert (rank.out, said) == ("", [])


def losses(run: Path) -> list[float]:
    """Return the losses that a run has logged, step by step."""
    return [line["loss"] for line in read_log(run / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def straight(fleet, data, tmp_path_factory) -> dict[str, Any]:
    """Return the end of the run by one process."""
    run = tmp_path_factory.mktemp("straight") / "run"
    ended_well(fleet.run(1, train(data, run)))
    return {"run": run, "end": merged(newest(run)), "losses": losses(run)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_bytes_at_any_world_size(fleet, data, straight, tmp_path, world_size):
    run = tmp_path / "run"
    ended_well(fleet.run(world_size, train(data, run)))
    assert differences(straight["end"], merged(newest(run))) == []
    assert losses(run) == straight["losses"]
    assert len(losses(run)) == MAX_STEPS
    ours, theirs = (read_log(folder / "metrics.jsonl") for folder in (run, straight["run"]))
    for mine, other in zip(ours, theirs, strict=True):
        for line in (mine, other):
            line.pop("samples_per_s", None)
            for counters in line.get("tables", {}).values():
                counters.pop("capacity")  # rows allocated: each owner has blocks of its own
        assert mine == other
    predictions = Path("predictions") / "eval.parquet"
    assert (run / predictions).read_bytes() == (straight["run"] / predictions).read_bytes()
    assert verify(run) == []
    assert len(list(newest(run).glob("table-user-*"))) == world_size  # every rank wrote its own


def killed_on_the_way(fleet: Fleet, data: Path, run: Path, ways: Any, *settings: str) -> None:
    """Train by the given numbers of ranks one after the other, each until its last rank is killed after the given step."""
    plan = run.parent / "plan.json"
    for number, (world_size, step) in enumerate(ways):
        plan.write_text(json.dumps({"step": step, "rank": world_size - 1, "kind": "kill"}))
        done = fleet.run(world_size, train(data, run, *settings, f"faults={plan}", resume=number > 0))
        assert all(rank.code for rank in done), [rank.err for rank in done]


def test_a_run_moves_between_world_sizes(fleet, data, straight, tmp_path):
    """1 -> 8 -> 2 -> 4 ranks, killed on the way each time, with deltas: the end is that of the straight run."""
    run = tmp_path / "run"
    killed_on_the_way(fleet, data, run, ((1, 2), (8, 4), (2, 5)), "deltas=1")
    ended_well(fleet.run(4, train(data, run, resume=True)))
    assert differences(straight["end"], merged(newest(run))) == []
    assert losses(run) == straight["losses"]
    assert verify(run) == []


def test_wherever_tables_lie_the_bytes_are_equal(fleet, data, straight, tmp_path):
    """One table on one rank, hot ids of the other copied to both, ids of the next step asked ahead; killed, resumed by 4."""
    run = tmp_path / "run"
    places = ("parallel.places.table_wise=user", "parallel.places.hot_ids=10", "parallel.places.hot_every_steps=2")
    killed_on_the_way(fleet, data, run, ((2, 4),), *places)
    ended_well(fleet.run(4, train(data, run, resume=True)))
    assert differences(straight["end"], merged(newest(run))) == []
    assert losses(run) == straight["losses"]
    assert verify(run) == []
    run = tmp_path / "whole"
    ended_well(fleet.run(2, train(data, run, "parallel.places.data_parallel=user,item")))
    assert differences(straight["end"], merged(newest(run))) == []
    assert losses(run) == straight["losses"]


def sightings(end: dict[str, Any]) -> dict[str, Any]:
    """Return what of a run's end depends on which samples were trained on, and not on the order of sums."""
    names = [
        f"{table}.{what}" for table in ("user", "item") for what in ("ids", "count", "last_seen", "sightings.counts")
    ]
    counters = [name for name in end if ".counters." in name and not name.endswith("default_reads")]
    return {name: end.get(name) for name in (*names, *counters, "reader", "run.samples", "run.step", "step")}


def test_a_run_moves_to_any_number_of_ranks(fleet, data, straight, tmp_path):
    """2 -> 3 -> 1 rank with as many parts as ranks: every sample of the epoch is trained on once, and none twice."""
    run = tmp_path / "run"
    killed_on_the_way(fleet, data, run, ((2, 2), (3, 4)), "parts=none")
    ended_well(fleet.run(1, train(data, run, resume=True)))
    assert differences(sightings(straight["end"]), sightings(merged(newest(run)))) == []
    assert verify(run) == []


def test_without_parts_the_same_run_to_rounding(fleet, data, straight, tmp_path):
    """parts = W and DDP's own order: every sample once, losses near those of the straight run."""
    run = tmp_path / "run"
    ended_well(fleet.run(2, train(data, run, "parts=2", "deterministic=false")))
    assert differences(sightings(straight["end"]), sightings(merged(newest(run)))) == []
    # dropout differs between the cuts, so losses are of the same size and not equal
    assert losses(run) == pytest.approx(straight["losses"], rel=0.2)


FAULTS = ("kill", "hang", "fail", "lost_in_save", "full_disk", "truncated")


def make_fault(fleet: Fleet, data: Path, run: Path, *, kind: str, seed: int) -> list[RankDone]:
    """Start a run of 2 or 4 ranks in which one rank has a fault at a random step; return how it ended."""
    choice = random.Random(seed)
    world_size = choice.choice([2, 4])
    rank, step = choice.randrange(world_size), choice.randrange(1, MAX_STEPS)
    if kind == "truncated":
        step = MAX_STEPS - 1
    if kind in ("lost_in_save", "full_disk"):
        step = choice.choice([1, 3])  # the save that breaks is that of the next step
    plan = run.parent / f"{run.name}-plan.json"
    made = "kill" if kind == "truncated" else kind
    plan.write_text(json.dumps({"step": step, "rank": rank, "kind": made}))
    job = fleet.start(world_size, train(data, run, f"faults={plan}", "timeout=20" if kind == "hang" else "timeout=60"))
    done = job.wait()
    if kind == "truncated" and len(list_checkpoints(run)) > 1:  # with none that is whole a run is refused
        parts = sorted(newest(run).glob("*.safetensors"))
        victim = choice.choice(parts)
        victim.write_bytes(victim.read_bytes()[: choice.randrange(victim.stat().st_size)])
    return done


def goes_on(fleet: Fleet, data: Path, run: Path, straight: dict[str, Any], *, kind: str, seed: int) -> None:
    """Make a fault, resume with another number of ranks, and assert the end of the straight run."""
    done = make_fault(fleet, data, run, kind=kind, seed=seed)
    assert all(rank.code for rank in done), (kind, [rank.code for rank in done])
    lines = [[line for line in rank.err.splitlines() if line.startswith("recis: ")] for rank in done]
    assert len(lines[0]) <= 1  # none where rank 0 itself was killed or hung
    said = [line for of_rank in lines for line in of_rank]
    pattern = {
        "kill": "no sign of life: killed or lost",
        "hang": "hung, nothing came within timeout_s=20",
        "fail": r"a made-up fault",
        "lost_in_save": "no sign of life: killed or lost",
        "full_disk": r"rank \d: .*No space left",
        "truncated": "no sign of life: killed or lost",
    }[kind]
    if said or kind not in ("kill", "lost_in_save", "truncated"):
        assert said, [rank.err[-800:] for rank in done]
        assert re.search(pattern, said[0]), (kind, said)
    else:  # torchrun's signals were faster than the ranks that were left; torchrun itself names the one that was killed
        assert {rank.code for rank in done} <= {-signal.SIGKILL, -signal.SIGTERM}, done
    whole = list_checkpoints(run)
    if kind != "truncated":
        assert not whole or verify(run) == []
    plan = run.parent / f"{run.name}-plan.json"
    plan.unlink(missing_ok=True)
    ended_well(fleet.run(random.Random(seed).choice([1, 2, 4]), train(data, run, resume=True)))
    assert differences(straight["end"], merged(newest(run))) == []
    assert losses(run) == straight["losses"]


@pytest.mark.parametrize(
    ("kind", "seed"), [(kind, number) for number, kind in enumerate(FAULTS)] + [("kill", 6), ("fail", 7)]
)
def test_a_fault_costs_no_sample(fleet, data, straight, tmp_path, kind, seed):
    goes_on(fleet, data, tmp_path / "run", straight, kind=kind, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_chaos(fleet, data, straight, tmp_path, seed):
    goes_on(fleet, data, tmp_path / "run", straight, kind=random.Random(seed).choice(FAULTS), seed=seed)


@pytest.mark.slow
def test_two_hundred_launches_end_cleanly(fleet, data, tmp_path):
    for launch in range(200):
        run = tmp_path / f"run-{launch}"
        deterministic = "true" if launch % 2 else "false"
        ended_well(fleet.run(2, train(data, run, "parts=2", f"deterministic={deterministic}", "max_steps=2")))
        shutil.rmtree(run)


def test_a_hook_stops_all_ranks_at_one_step(fleet, data, tmp_path):
    run, plan = tmp_path / "run", tmp_path / "plan.json"
    plan.write_text(json.dumps({"step": 3, "rank": 1, "kind": "stop"}))
    ended_well(fleet.run(2, train(data, run, f"faults={plan}")))
    assert newest(run).name == "step_000000003"


def one_line(done: list[RankDone]) -> str:
    """Return rank 0's line of a job that was refused: the only one, and all ranks failed."""
    assert all(rank.code for rank in done), [rank.code for rank in done]
    lines = [line for rank in done for line in rank.err.splitlines() if line]
    assert len(lines) == 1, [rank.err for rank in done]
    assert lines[0].startswith("recis: ")
    assert done[0].err
    return lines[0]


def test_bad_jobs_are_refused_in_one_line(fleet, data, tmp_path):
    """One launch each: another setting or version on a rank, another world size, a missing rank, no master, no run."""
    usual = train(data, tmp_path / "a")
    other = train(data, tmp_path / "a", "max_steps=5")
    line = one_line(fleet.run(2, [usual, other]))
    assert "rank 1 would not run what rank 0 runs: config.max_steps: 6 -> 5" in line
    assert not (tmp_path / "a").exists()  # nothing of the refused run is left

    line = one_line(fleet.run(2, usual, env=[{"JOB_TORCH": "2.13.0"}, {"JOB_TORCH": "2.12.1"}]))
    assert 'rank 1 would not run what rank 0 runs: versions.torch: "2.13.0" -> "2.12.1"' in line
    assert not (tmp_path / "a").exists()

    quick = [*train(data, tmp_path / "b"), "--join-timeout-s", "2"]
    line = one_line(fleet.run(2, quick, env=[{}, {"WORLD_SIZE": "3"}]))
    assert "rank 1 was started with WORLD_SIZE=3, this one with 2" in line

    done = fleet.run(1, quick, env={"WORLD_SIZE": "3"})
    assert "ranks [1, 2] have not come within 2 s" in one_line(done)

    done = fleet.run(1, quick, env={"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "9"})
    assert done[0].code == 1
    assert re.search(r"recis: rank 1 cannot reach the job's master at 127.0.0.1:9 within 2 s: check", done[0].err)

    line = one_line(fleet.run(2, train(data, tmp_path / "c", "parts=3")))
    assert "parallel.parts=3 must be a multiple of the 2 processes" in line

    line = one_line(fleet.run(2, ["train", "job_recipe:nothing", "--out", tmp_path / "d"]))
    assert "recipe 'job_recipe:nothing' cannot be imported" in line


class JobOfRank1:
    """A job in which rank 0 has begun a run in a folder that this rank does not see."""

    rank, world_size = 1, 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rank_0_first(self, work: Any) -> Any:
        return work()

    def hear(self, key: str) -> str:
        assert key == "folder"
        return str(self.folder)


def test_a_folder_that_is_not_shared_is_named(data, tmp_path):
    job: Any = JobOfRank1(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"elsewhere: rank 1 does not see the run that rank 0 has begun there"):
        start_run(RECIPE, data=str(data), out=tmp_path, settings=(), resume=False, job=job)


def spans(run: Path, rank: int) -> list[dict[str, Any]]:
    """Return the spans of a rank's timeline, with `end`."""
    trace = json.loads((run / f"timeline-{rank}.json").read_text())
    return [event | {"end": event["ts"] + event["dur"]} for event in trace["traceEvents"] if event["ph"] == "X"]


def test_ids_of_the_next_step_travel_beside_this_one(fleet, data, straight, tmp_path):
    """Over a link of 30 ms: with overlap the ids are under way before the update ends, without they never are; equal bytes."""
    settings = ("parallel.link_delay_ms=30", "parallel.timeline_steps=9")  # more than there are: written at the end
    begun_early = {}
    for overlap in ("true", "false"):
        run = tmp_path / overlap
        ended_well(fleet.run(2, train(data, run, *settings, f"parallel.overlap={overlap}")))
        assert differences(straight["end"], merged(newest(run))) == []
        for rank in (0, 1):
            every = spans(run, rank)
            updates = sorted((e for e in every if e["name"] == "update"), key=lambda e: e["ts"])
            assert [e["args"]["step"] for e in updates] == [1, 2, 3, 4, 5, 6]
            ids = [e for e in every if e["name"].startswith("ids for") and e["tid"] == 1]
            assert all(e["dur"] >= 30_000 for e in ids)
            begun_early[overlap, rank] = sum(
                any(e["ts"] < u["ts"] and e["end"] > u["end"] for u in updates) for e in ids
            )
    assert begun_early["false", 0] == begun_early["false", 1] == 0
    assert min(begun_early["true", 0], begun_early["true", 1]) >= 4


def test_a_run_goes_on_with_other_settings_that_change_no_value(fleet, data, straight, tmp_path):
    """Begun with overlap, killed, resumed without: all ranks must say so, the new settings hold, bytes are equal."""
    run = tmp_path / "run"
    killed_on_the_way(fleet, data, run, ((2, 5),))
    first = 1 + max((int(path.name.removeprefix("step_")) for path in list_checkpoints(run)), default=0)
    free = ("parallel.timeline_steps=2", "parallel.link_delay_ms=20", "parallel.timeout_s=50", "parallel.overlap=false")
    line = one_line(
        fleet.run(2, [train(data, run, *free, resume=True), train(data, run, *free[:-1], resume=True)])
    )  # overlap decides the order of collectives
    assert "rank 1 would not run what rank 0 runs: config.parallel.overlap: false -> true" in line
    line = one_line(fleet.run(2, train(data, run, "parallel.rows_dtype=bfloat16", *free, resume=True)))
    assert "the run there was started otherwise" in line
    assert 'settings.parallel.rows_dtype: "(absent)" -> "bfloat16"' in line
    ended_well(fleet.run(2, train(data, run, *free, resume=True)))
    assert differences(straight["end"], merged(newest(run))) == []
    for rank in (0, 1):
        every = spans(run, rank)
        assert [e["args"]["step"] for e in every if e["name"] == "update"] == [first, first + 1]
        updates = [e for e in every if e["name"] == "update"]
        ids = [e for e in every if e["name"].startswith("ids for") and e["tid"] == 1]
        assert all(e["dur"] >= 20_000 for e in ids)
        assert not any(e["ts"] < u["ts"] and e["end"] > u["end"] for u in updates for e in ids)
