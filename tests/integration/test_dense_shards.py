"""A dense part that is dealt to gloo processes: losses, weights and checkpoints of the run that is not, 1/W of its bytes."""

import json
import os
import re
from pathlib import Path
from typing import Any

import job_recipe
import pytest
import shard_recipe
import torch
from fleet import RankDone
from merged import merged, newest
from torch import Tensor

from recis.checkpoint import verify
from recis.distributed.config import Parallel
from recis.distributed.dense_units import check_types, find_units, kept_whole, whole_at_once
from recis.distributed.ranks import Ranks
from recis.errors import ConfigError
from recis.trainer.log import read_log
from recis.trainer.parallel import deal_dense

RTOL, ATOL = 2e-5, 2e-6  # sums over ranks in another order, over six steps of Adam


def train(data: Path, out: Path, *settings: str, resume: bool = False) -> list[str]:
    """Return the arguments of the command; `out` gets a folder of probes beside it where settings ask for one."""
    chosen = [part for setting in settings for part in ("--set", setting)]
    asked = ["train", "shard_recipe:recipe", "--data", str(data), "--out", str(out), *chosen]
    return [*asked, *(["--resume"] if resume else [])]


def ended_well(done: list[RankDone]) -> None:
    """Assert exit code 0 of every rank, and that only rank 0 said something."""
    for rank in done:
        assert rank.code == 0, rank.err
        assert "Traceback" not in rank.err
    assert [(rank.out, rank.err) for rank in done[1:]] == [("", "")] * (len(done) - 1)


def losses(run: Path, kind: str = "train") -> list[float]:
    """Return the losses that a run has logged."""
    return [line["loss"] for line in read_log(run / "metrics.jsonl") if line["kind"] == kind]


def assert_close(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare two ends of runs: floats to RTOL and ATOL, all else exactly."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, other, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}"
            )
        elif isinstance(value, float):
            assert value == pytest.approx(other, rel=1e-5), name
        elif isinstance(value, dict) and name == "metrics":
            assert value == pytest.approx(other, rel=1e-4), name
        else:
            assert value == other, name


@pytest.fixture(scope="module")
def straight(fleet, data, tmp_path_factory) -> dict[str, Any]:
    """Return the end of the run by one process, for which parallel.shard_dense has no effect."""
    folder = tmp_path_factory.mktemp("straight")
    run, probe = folder / "run", folder / "probe"
    probe.mkdir()
    ended_well(fleet.run(1, train(data, run, f"probe={probe}")))
    return {"run": run, "probe": probe, "end": merged(newest(run)), "losses": losses(run)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_dealt_run_is_the_straight_one(fleet, data, straight, tmp_path, world_size):
    """Parts are accumulated, clip_grad_norm is set, dropout draws by part: everything of a run, to rounding."""
    run, probe = tmp_path / "run", tmp_path / "probe"
    probe.mkdir()
    ended_well(fleet.run(world_size, train(data, run, f"probe={probe}")))
    assert losses(run) == pytest.approx(straight["losses"], rel=1e-6)
    assert losses(run, "eval") == pytest.approx(losses(straight["run"], "eval"), rel=1e-6)
    assert_close(merged(newest(run)), straight["end"])
    assert verify(run) == []
    # a hook that reads weights sees them whole after each step, and so does what follows training
    norms, others = ((folder / "norms.jsonl").read_text().splitlines() for folder in (probe, straight["probe"]))
    assert len(norms) == job_recipe.MAX_STEPS
    for mine, other in zip(norms, others, strict=True):
        assert json.loads(mine) == pytest.approx(json.loads(other), rel=1e-5)
    last = torch.load(probe / "model.pt")
    saved = {name: value for name, value in merged(newest(run)).items() if name.startswith("dense.")}
    assert saved.keys() == {f"dense.{name}" for name in last}
    assert all(torch.equal(value, saved[f"dense.{name}"]) for name, value in last.items())
    bytes_add_up(probe, straight["probe"], world_size)


def bytes_add_up(probe: Path, alone: Path, world_size: int) -> None:
    """Assert that each rank holds ceil(n / W) rows of weights and optimizer state at most, and all of them hold all once."""
    whole = json.loads((alone / "held-0.json").read_text())
    held = [json.loads((probe / f"held-{rank}.json").read_text()) for rank in range(world_size)]
    for name, entry in whole.items():
        rows = entry["shape"][0] if entry["shape"] else 1
        most = -(-rows // world_size)
        for what in ("own", "state"):
            shares = [rank[name][what] for rank in held]
            if name == "gain":  # a scalar is kept whole
                assert shares == [entry[what]] * world_size
                continue
            assert sum(shares) == entry[what], name
            assert max(shares) == entry[what] // rows * most, name
        assert all(rank[name]["seen"] == entry["own"] for rank in held), name  # what follows training sees all of it
    assert sum(entry["state"] for entry in whole.values()) > sum(entry["own"] for entry in whole.values())


def test_a_run_goes_on_at_other_world_sizes(fleet, data, straight, tmp_path):
    """2 dealt, 2 not dealt, 4 dealt, killed on the way each time: losses and the end are those of the straight run."""
    run, plan, probe = tmp_path / "run", tmp_path / "plan.json", tmp_path / "probe"
    probe.mkdir()
    settings = (f"probe={probe}", f"faults={plan}")
    for number, (world_size, step, dealt) in enumerate(((2, 3, "true"), (2, 5, "false"))):
        plan.write_text(json.dumps({"step": step, "rank": world_size - 1, "kind": "kill"}))
        asked = (*settings, f"parallel.shard_dense={dealt}")
        done = fleet.run(world_size, train(data, run, *asked, resume=number > 0))
        assert all(rank.code for rank in done), [rank.err for rank in done]
        if world_size > 1 and done[0].err:  # rank 0 had the time to say whom it waited for
            assert re.search(r"recis: step \d, .*: rank 1 gives no sign of life", done[0].err), done[0].err
    ended_well(fleet.run(4, train(data, run, *settings, resume=True)))  # the setting it was started with holds again
    assert losses(run) == pytest.approx(straight["losses"], rel=1e-6)
    assert_close(merged(newest(run)), straight["end"])
    assert verify(run) == []


def test_a_new_run_starts_from_the_weights_and_state_of_another(fleet, data, straight, tmp_path):
    """init_from, once alone and once dealt to four: both train on from there alike."""
    ends = {}
    for world_size in (1, 4):
        run = tmp_path / str(world_size)
        ended_well(fleet.run(world_size, train(data, run, f"init={newest(straight['run'])}", "max_steps=1")))
        ends[world_size] = (losses(run), merged(newest(run)))
    assert ends[4][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert_close(ends[4][1], ends[1][1])
    assert (
        float(ends[4][1]["optim.first.0.weight.step"]) == job_recipe.MAX_STEPS + 1
    )  # the optimizer's state went along


def test_gradients_and_whole_weights_by_ranks(fleet):
    """The cases of shard_cases: a plain model in float64, whole weights, states, refusals."""
    done = fleet.run(3, [], call="shard_cases:main")
    ended_well(done)
    assert done[0].out.splitlines() == ["ok of_model", "ok of_refusals"]


def test_a_deterministic_job_is_refused_in_one_line(fleet, data, tmp_path):
    done = fleet.run(2, train(data, tmp_path / "run", "deterministic=true"))
    assert all(rank.code for rank in done)
    (line,) = [line for rank in done for line in rank.err.splitlines() if line]
    assert line.startswith("recis: parallel.shard_dense: gradients are added in an order"), line
    assert line.endswith("set deterministic=false, or parallel.shard_dense=false")


# ---- without processes


def net() -> torch.nn.Module:
    base: Any = job_recipe.recipe(data="nowhere", out=Path(os.devnull)).model
    return shard_recipe.Net(base.tables, base.dense)


def test_units_are_what_a_model_calls_and_shares_with_nobody():
    model = net()
    assert list(find_units(model, shard_recipe.UNIT)) == ["first", "blocks.0", "blocks.1", "frozen", "small"]
    assert list(find_units(model, 182)) == ["first", "blocks.0", "blocks.1", "frozen"]  # 182 numbers each
    assert find_units(model, 183) == {}
    assert list(kept_whole(model)) == ["gain"]
    sizes = [sum(v.numel() for v in m.parameters()) for m in find_units(model, shard_recipe.UNIT).values()]
    total = sum(value.numel() for value in model.parameters())
    assert whole_at_once(model, shard_recipe.UNIT) == total - sum(sizes) + sum(sorted(sizes)[-2:])
    assert whole_at_once(model, 10_000) == total


def test_types_may_differ_between_units_and_not_in_one():
    model: Any = net()
    model.blocks[0].double()
    check_types(model, find_units(model, shard_recipe.UNIT))  # a unit of its own
    with pytest.raises(ConfigError, match=r"the model outside its units trains .* torch.float64; gradients of a unit"):
        check_types(model, find_units(model, 10_000))
    model.blocks[0][0].bias = torch.nn.Parameter(torch.zeros(13))
    with pytest.raises(
        ConfigError, match=r"unit 'blocks.0' trains 'blocks.0.0.weight' in torch.float64 and 'blocks.0.0.b"
    ):
        check_types(model, find_units(model, shard_recipe.UNIT))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="unit_parameters must be at least 1; got 0"):
        Parallel(unit_parameters=0)
    asked = Parallel(shard_dense=True)
    assert not asked.deals_dense(1, deterministic=True)  # one process deals nothing and refuses nothing
    assert asked.deals_dense(2, deterministic=False)
    assert not Parallel().deals_dense(2, deterministic=True)
    with pytest.raises(ConfigError, match="equal bytes cannot be promised as deterministic=True does; set determ"):
        asked.deals_dense(2, deterministic=True)


def test_a_model_that_does_not_train_is_not_dealt():
    config = shard_recipe.recipe(data="nowhere", out=Path(os.devnull))
    assert deal_dense(net().requires_grad_(False), config, Ranks(0, 2)) is None


def test_an_older_torch_is_refused(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    config = shard_recipe.recipe(data="nowhere", out=Path(os.devnull))
    with pytest.raises(ConfigError, match=r"parallel.shard_dense needs torch 2.13, .* this is .*: update it, or set"):
        deal_dense(net(), config, Ranks(0, 2))
