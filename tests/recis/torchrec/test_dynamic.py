"""Dynamic tables in a TorchRec model: under DistributedModelParallel and its pipeline on two gloo ranks, and alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recis.checkpoint import Target, latest, load
from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, Feature, TableConfig, TableSet, Tile
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import RowWiseAdagrad, SparseOptimizer
from recis_kernels.ids_partition import slice_bounds, slice_of_id

pytestmark = pytest.mark.torchrec
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _installed():
    """Skip without it; imported here and not above, so that tests of other parts are collected without it."""
    pytest.importorskip("torchrec")


@pytest.fixture(scope="module")
def job() -> Any:
    """Return the module that both ranks run; importing it takes seconds."""
    import torchrec_job

    return torchrec_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run the job of two ranks once."""
    made = tmp_path_factory.mktemp("dmp")
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "tests" / "torchrec_job.py"), str(made)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def results(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return what each rank has written."""
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["pipeline", "freed"])
def test_pipeline_changes_no_bit(folder, kind):
    """Also where it frees a batch as soon as its ids are under way."""
    for plain, pipelined in zip(results(folder, "plain"), results(folder, kind), strict=True):
        assert pipelined["pipelined"] == ["pooled", "single", "static"]
        for one, other in zip(plain["scores"], pipelined["scores"], strict=True):
            assert torch.equal(one, other)
        for name, fields in plain["rows"].items():
            for field, values in fields.items():
                assert torch.equal(values, pipelined["rows"][name][field]), (name, field)
        assert plain["counters"] == pipelined["counters"]


def test_ids_of_the_next_batch_travel_before_the_update(folder):
    for plain, pipelined in zip(results(folder, "plain"), results(folder, "pipeline"), strict=True):
        assert plain["events"][:6] == ["ask", "step"] * 3
        assert pipelined["events"] == ["ask", *(["ask", "step"] * 4), "step", "ask"]


def test_equals_one_process(folder, job):
    """The same model without ranks: TorchRec's unsharded tables, our collections, the mean of both ranks' losses."""
    ranks = results(folder, "plain")
    table_set = TableSet(job.dynamic_tables(), seed=3)
    pooled, single = EmbeddingBagCollection(table_set), EmbeddingCollection(table_set)
    static = job.static_tables("cpu")
    for weights in static.parameters():
        job.first_weights(weights)
    top = job.Model(nn.Identity(), nn.Identity(), nn.Identity()).top
    dense, rows = torch.optim.SGD([*static.parameters(), *top.parameters()], lr=job.LR), SparseOptimizer([table_set])

    def forward(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ours = KeyedJaggedTensor.from_torchrec(batch)
        vectors, path = pooled(ours), single(ours)["path"].values
        scores = top(torch.cat([static(batch).values(), *vectors.values()], dim=1))
        return (scores - 1).square().mean() + path.square().sum() / job.BATCH, scores

    for step in range(job.NUM_STEPS):
        losses = []
        for rank in (0, 1):
            loss, scores = forward(job.batch(step, rank))
            losses.append(loss)
            torch.testing.assert_close(ranks[rank]["scores"][step], scores.detach(), rtol=1e-5, atol=1e-6)
        dense.zero_grad()
        ((losses[0] + losses[1]) / 2).backward()
        dense.step()
        rows.step()
        table_set.end_step(step + 1)
    pooled.eval()
    single.eval()
    for rank in (0, 1):
        torch.testing.assert_close(
            ranks[rank]["scores"][-1], forward(job.batch(99, rank))[1].detach(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            ranks[rank]["dense"], {name: value.detach() for name, value in top.named_parameters()}
        )
    for table in table_set:
        want = table.export()
        got = {field: torch.cat([rank["rows"][table.name][field] for rank in ranks]) for field in want}
        order = got["ids"].argsort()
        for field, values in want.items():
            torch.testing.assert_close(got[field][order], values, rtol=1e-5, atol=1e-7)
        counted = [rank["counters"][table.name] for rank in ranks]
        assert sum(counters["evicted"] for counters in counted) == table.counters().evicted
    assert table_set["path"].counters().evicted > 0
    assert {rank["step"] for rank in ranks} == {job.NUM_STEPS}


def test_each_rank_owns_its_slices(folder):
    bounds = slice_bounds(2)
    for rank, result in enumerate(results(folder, "plain")):
        ids = torch.cat([fields["ids"] for fields in result["rows"].values()])
        slices = slice_of_id(ids)
        assert ids.numel() > 0
        assert bool(((slices >= bounds[rank]) & (slices < bounds[rank + 1])).all())


def test_planner_and_state_dict_know_static_tables_alone(folder):
    owned = []
    for result in results(folder, "plain"):
        assert result["planned"] == {"static": ["shop", "user"]}
        assert not [name for name in result["state_dict"] if name.startswith(("pooled", "single"))]
        owned += result["optimizer_state"]
    assert sorted(owned) == ["static.embedding_bags.shop.weight", "static.embedding_bags.user.weight"]


def test_checkpoint_of_two_ranks_loads_in_one_process(folder, job):
    table_set = TableSet(job.dynamic_tables(), seed=3)
    checkpoint = latest(folder / "run")
    assert checkpoint is not None
    load(checkpoint, into=Target(tables=table_set.tables), parts={"weights", "optimizer"})
    for table in table_set:
        ranks = [result["rows"][table.name] for result in results(folder, "plain")]
        order = torch.cat([fields["ids"] for fields in ranks]).argsort()
        for field, values in table.export().items():
            assert torch.equal(values, torch.cat([fields[field] for fields in ranks])[order]), field
        assert table.t == job.NUM_STEPS


def test_a_forgotten_update_is_named(folder):
    for result in results(folder, "plain"):
        assert "table 'item'" in result["forgot"]
        assert "DistributedModelParallel.fused_optimizer" in result["forgot"]


def test_an_export_trains_on_in_shards(folder, job):
    """Equal to the same export trained by one process: outputs, weights and the fused optimizer's accumulators."""
    from recis.torchrec import to_torchrec

    ranks = results(folder, "exported")
    exported = to_torchrec(job.fixed_collection())
    optimizer = exported.optimizer()
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        for rank, result in enumerate(ranks):
            assert result["pipelined"] == ["tables.embeddings"]
            values = exported(job.fixed_batch(step, rank)).values()
            torch.testing.assert_close(result["outputs"][step], values.detach(), rtol=1e-5, atol=1e-6)
            ((values * (values + 1)).sum() / 2).backward()
        optimizer.step()
    shards = {name: value for result in ranks for name, value in result["shards"].items()}
    assert len(shards) == 4
    bags: Any = exported.embeddings.embedding_bags
    for name, weights in bags.items():
        got = shards[f"tables.embeddings.embedding_bags.{name}.weight"]
        torch.testing.assert_close(got, weights.weight.detach(), rtol=1e-5, atol=1e-6)
        summed = optimizer.state[weights.weight]["sum"].squeeze(1)
        torch.testing.assert_close(shards[f"{name}.momentum1"], summed, rtol=1e-5, atol=1e-6)


def test_unpooled_shards_are_filled_too(folder):
    """The job compares both; here that it has looked at rows that are not zero and one id outside the vocabulary."""
    for result in results(folder, "exported"):
        assert result["unpooled"].any(dim=1).tolist() == [True, False, True]


def test_shards_that_cannot_take_the_state_are_named(folder):
    for result in results(folder, "exported"):
        none, cut, copied = result["refusals"]
        assert "table 'wide': its rows carry ['h'], the model's optimizer keeps none" in none
        assert "table 'wide' is cut by columns in the model" in cut
        assert "table 'wide' is data-parallel in the model" in copied


# ---- alone


def configs() -> list[TableConfig]:
    return [
        TableConfig(
            name="item", features=("item", Feature("seen", "mean")), embedding_dim=3, optimizer=RowWiseAdagrad(lr=0.1)
        )
    ]


def batch(weights: bool = False) -> KeyedJaggedTensor:
    given = {"item": [[0.5], [], [2.0, 1.0]], "seen": [[1.0], [3.0, 1.0], []]} if weights else None
    return KeyedJaggedTensor.from_lists({"item": [[1], [], [-5, 1]], "seen": [[7], [1, 2**62], []]}, weights=given)


@pytest.mark.parametrize("weights", [False, True])
def test_alone_equals_our_collection(weights):
    from recis.torchrec import DynamicEmbeddingBagCollection

    plain, dynamic = EmbeddingBagCollection(configs(), seed=1), DynamicEmbeddingBagCollection(configs(), seed=1)
    optimizer = SparseOptimizer(plain)
    for step in (1, 2, 3):
        ours, theirs = plain(batch(weights)), dynamic(batch(weights).to_torchrec()).wait()
        assert theirs.keys() == ["item", "seen"]
        assert theirs.length_per_key() == [3, 3]
        assert torch.equal(theirs.values(), torch.cat(list(ours.values()), dim=1))
        torch.cat(list(ours.values()), dim=1).square().sum().backward()
        theirs.values().square().sum().backward()
        optimizer.step()
        plain.end_step(step)
        dynamic.fused_optimizer.step()
    one, other = plain.table_set["item"].export(), dynamic.table_set["item"].export()
    assert all(torch.equal(values, other[field]) for field, values in one.items())
    dynamic.eval()
    unknown = KeyedJaggedTensor.from_lists({"item": [[77], [-5]], "seen": [[78], []]})
    assert dynamic(unknown.to_torchrec()).values()[0].tolist() == [0.0] * 6
    assert len(dynamic.table_set["item"]) == len(one["ids"])


def test_unpooled_vectors_come_as_jagged_tensors_of_torchrec():
    from recis.torchrec import DynamicEmbeddingCollection

    dynamic = DynamicEmbeddingCollection([TableConfig(name="item", features=("item",), embedding_dim=2)], seed=1)
    ids = KeyedJaggedTensor.from_lists({"item": [[4], [], [4, 9]]})
    found = dynamic(ids.to_torchrec())["item"]
    assert found.lengths().tolist() == [1, 0, 2]
    assert torch.equal(found.values()[0], found.values()[1])
    assert found.values().shape == (3, 2)


def test_gradients_accumulate_when_asked():
    from recis.torchrec import DynamicEmbeddingBagCollection

    dynamic = DynamicEmbeddingBagCollection(configs(), seed=1, accumulate_steps=2)
    for calls in (1, 2):
        dynamic(batch().to_torchrec()).values().sum().backward()
        dynamic.fused_optimizer.step()
        dynamic.fused_optimizer.zero_grad()
        assert dynamic.table_set.step == calls // 2
    assert dynamic.table_set["item"].t == 1


def test_learning_rates_are_param_groups_of_their_tables():
    from recis.torchrec import DynamicEmbeddingBagCollection

    dynamic = DynamicEmbeddingBagCollection(configs(), seed=1)
    groups: Any = dynamic.fused_optimizer.param_groups
    (group,) = groups
    assert (group["name"], group["lr"]) == ("item", 0.1)
    before = dynamic(batch().to_torchrec()).values().detach().clone()
    dynamic(batch().to_torchrec()).values().sum().backward()
    group["lr"] = 0.0
    dynamic.fused_optimizer.step()
    assert torch.equal(dynamic(batch().to_torchrec()).values().detach(), before)


def test_a_group_that_cannot_move_cpu_tensors_is_named():
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from recis.torchrec import DynamicEmbeddingBagCollection

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match=r"process_group is of backend 'fake'.*new_group\(backend='gloo'\)"):
            DynamicEmbeddingBagCollection(configs(), seed=1)
    finally:
        dist.destroy_process_group()


def test_bad_input_is_named():
    from recis.torchrec import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection

    with pytest.raises(ConfigError, match="give seed="):
        DynamicEmbeddingBagCollection(configs())
    tiled = [TableConfig(name="item", features=(Feature("item", Tile(2)),), embedding_dim=3)]
    with pytest.raises(ConfigError, match=r"feature 'item' has pooling Tile\(n=2\), which TorchRec's KeyedTensor"):
        DynamicEmbeddingBagCollection(tiled, seed=1)
    with pytest.raises(ConfigError, match="feature 'seen' has pooling 'mean'"):
        DynamicEmbeddingCollection(configs(), seed=1)
    dynamic = DynamicEmbeddingBagCollection(configs(), seed=1)
    ids = batch()
    narrow = KeyedJaggedTensor(ids.keys, ids.values.int(), ids.lengths, stride=ids.stride)
    with pytest.raises(ValueError, match=r"ids must be int64; the batch has torch\.int32"):
        dynamic(narrow.to_torchrec())
    with pytest.raises(ValueError, match="the batch has no feature 'seen'"):
        dynamic(ids.split([1, 1])[0].to_torchrec())
