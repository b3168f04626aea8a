"""Two gloo ranks that train static tables of TorchRec beside dynamic ones, with and without its pipeline.

    python torchrec_job.py FOLDER     writes plain-0.pt, plain-1.pt, pipeline-0.pt, ... and a checkpoint into it

One process imports everything, then forks the ranks: an import of TorchRec takes seconds.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection as StaticTables
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as FusedRowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed

from recis.checkpoint import Boundary, Saver
from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, Feature, LruCapacity, TableConfig
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam, RowWiseAdagrad, Sgd, SparseOptimizer
from recis.torchrec import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection, fill_shards, to_torchrec

WORLD_SIZE, NUM_STEPS, BATCH, LR = 2, 5, 6, 0.1
KEYS = ("user", "item", "seen", "shop", "path")
STATIC_ROWS = {"user": 40, "shop": 12}
EVICTION = (LruCapacity(9),)


def dynamic_tables() -> list[TableConfig]:
    """Return two tables of one store and one of another; one of them evicts."""
    adagrad, adam = RowWiseAdagrad(lr=LR), Adam(lr=LR)
    return [
        TableConfig(name="item", features=("item", Feature("seen", "mean")), embedding_dim=4, optimizer=adagrad),
        TableConfig(
            name="path", features=(Feature("path", "none"),), embedding_dim=4, optimizer=adam, eviction=EVICTION
        ),
    ]


def first_weights(weights: Tensor) -> None:
    """Fill a table's weights in place by a function of their place."""
    with torch.no_grad():
        weights.copy_(torch.arange(weights.numel()).view(weights.shape).sin() * 0.1)


def static_tables(device: str) -> StaticTables:
    """Return TorchRec's tables for the features user and shop."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=4, feature_names=[name], init_fn=first_weights)
        for name, rows in STATIC_ROWS.items()
    ]
    return StaticTables(configs, is_weighted=True, device=torch.device(device))


def batch(step: int, rank: int) -> TorchRecKeyed:
    """Return a rank's batch of a step; many ids of the dynamic tables are on both ranks, some features are empty."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 4, (len(KEYS), BATCH), generator=generator)
    weights = torch.rand(int(lengths.sum()), generator=generator) + 0.5
    values = []
    for number, key in enumerate(KEYS):
        count = int(lengths[number].sum())
        if key in STATIC_ROWS:
            values.append(torch.randint(0, STATIC_ROWS[key], (count,), generator=generator))
        else:
            values.append(torch.randint(-7, 7, (count,), generator=generator) * 2**40)
    return TorchRecKeyed(keys=list(KEYS), values=torch.cat(values), lengths=lengths.flatten(), weights=weights)


class Model(nn.Module):
    """Static tables, dynamic ones, pooled and not, and a linear top."""

    def __init__(self, static: nn.Module, pooled: nn.Module, single: nn.Module) -> None:
        super().__init__()
        self.static, self.pooled, self.single = static, pooled, single
        self.top = nn.Linear(16, 1)
        first_weights(self.top.weight)
        nn.init.zeros_(self.top.bias)

    def forward(self, features: TorchRecKeyed) -> tuple[Tensor, Tensor]:
        static, pooled, single = self.static(features), self.pooled(features), self.single(features)
        scores = self.top(torch.cat([static.values(), pooled.values()], dim=1))
        return (scores - 1).square().mean() + single["path"].values().square().sum() / BATCH, scores


def planned(model: nn.Module, constraints: dict[str, ParameterConstraints]) -> DistributedModelParallel:
    """Return the model under DMP, its static tables placed by TorchRec's planner."""
    topology = Topology(world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    assert dist.group.WORLD is not None
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, plan=plan, sharders=sharders)


def build(events: list[str]) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Return the model under DMP and the optimizer of all its parts; `events` notes what happens in which order."""
    pooled = DynamicEmbeddingBagCollection(dynamic_tables(), seed=3, features=["item", "seen"])
    single = DynamicEmbeddingCollection(pooled, features=["path"])
    model = Model(static_tables("meta"), pooled, single)
    apply_optimizer_in_backward(torch.optim.SGD, model.static.parameters(), {"lr": LR})
    user = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    dmp = planned(model, {"user": user})
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    optimizer = CombinedOptimizer(
        [dmp.fused_optimizer, KeyedOptimizerWrapper(dense, lambda params: torch.optim.SGD(params, lr=LR))]
    )
    _note(events, pooled, optimizer)
    return dmp, optimizer


def _note(events: list[str], pooled: Any, optimizer: Any) -> None:
    ask, step = pooled.input_dist, optimizer.step

    def noted_ask(*args: Any, **kwargs: Any) -> Any:
        events.append("ask")
        return ask(*args, **kwargs)

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        events.append("step")
        return step(*args, **kwargs)

    pooled.input_dist, optimizer.step = noted_ask, noted_step


def train(rank: int, *, kind: str) -> tuple[DistributedModelParallel, dict[str, Any]]:
    """Train NUM_STEPS steps, kind "plain", "pipeline", or "freed" (a pipeline that frees batches early)."""
    events: list[str] = []
    dmp, optimizer = build(events)
    scores, names = [], []
    batches: Iterator[TorchRecKeyed] = iter([batch(step, rank) for step in range(NUM_STEPS)])
    if kind != "plain":
        pipeline = TrainPipelineSparseDist(
            dmp, optimizer, torch.device("cpu"), free_features_storage_early=kind == "freed"
        )
        scores += [pipeline.progress(batches).detach().clone() for _ in range(NUM_STEPS)]
        forwards: list[Any] = [module.forward for module in pipeline._pipelined_modules]
        names = [forward.name for forward in forwards]
        pipeline.detach()
    else:
        for features in batches:
            optimizer.zero_grad()
            loss, found = dmp(features)
            loss.backward()
            optimizer.step()
            scores.append(found.detach().clone())
    dmp.eval()
    with torch.no_grad():
        scores.append(dmp(batch(99, rank))[1])
    module: Any = dmp.module
    plan: Any = dmp.plan.plan
    return dmp, {
        "scores": scores,
        "events": events,
        "pipelined": sorted(names),
        "planned": {path: sorted(tables) for path, tables in plan.items()},
        "rows": {table.name: table.export() for table in module.pooled.table_set},
        "counters": {table.name: table.counters().to_dict() for table in module.pooled.table_set},
        "step": module.pooled.table_set.step,
        "dense": {name: value.detach().clone() for name, value in module.top.named_parameters()},
        "state_dict": sorted(dmp.state_dict()),
        "optimizer_state": sorted(dmp.fused_optimizer.state_dict()["state"]),
    }


def save(dmp: DistributedModelParallel, folder: Path) -> None:
    """Write a checkpoint of the dynamic tables and the dense part by both ranks."""
    module: Any = dmp.module
    saver = Saver(folder / "run", peers=module.pooled.ranks, background=False)
    table_set = module.pooled.table_set
    dense = {name: value.detach() for name, value in module.top.named_parameters()}
    saver.save(Boundary(step=table_set.step, seed=3, table_sets=[table_set], dense=dense))
    saver.close()


def forgets_to_step(dmp: DistributedModelParallel, rank: int) -> str:
    """Return what is said when a second batch is trained before the rows were updated."""
    dmp.train()
    dmp(batch(0, rank))[0].backward()
    try:
        dmp(batch(1, rank))
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


class Ranker(nn.Module):
    """An exported collection and a loss."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, features: TorchRecKeyed) -> tuple[Tensor, Tensor]:
        values = self.tables(features).values()
        return (values * (values + 1)).sum(), values


def fixed_collection() -> EmbeddingBagCollection:
    """Return a collection that has seen every id of `fixed_batch` in two training steps."""
    adagrad = RowWiseAdagrad(lr=LR)
    collection = EmbeddingBagCollection(
        [
            TableConfig(name=name, features=(Feature(name, "sum"),), embedding_dim=4, optimizer=adagrad)
            for name in ("item", "seen")
        ],
        seed=8,
    )
    rows = SparseOptimizer(collection)
    for step in (1, 2):
        batch = KeyedJaggedTensor.from_lists({"item": [[3], list(range(-5, 5))], "seen": [list(range(-5, 5)), [step]]})
        values = torch.cat(list(collection(batch).values()), dim=1)
        (values * (values + 2)).sum().backward()
        rows.step()
        collection.end_step(step)
    return collection


def fixed_batch(step: int, rank: int) -> TorchRecKeyed:
    """Return a batch whose ids are those of `fixed_collection`, and now and then one more."""
    generator = torch.Generator().manual_seed(77 * step + rank)
    lengths = torch.randint(0, 4, (2 * BATCH,), generator=generator)
    values = torch.randint(-5, 6, (int(lengths.sum()),), generator=generator)
    return TorchRecKeyed(keys=["item", "seen"], values=values, lengths=lengths)


def train_exported(rank: int) -> dict[str, Any]:
    """Train an export under DMP and the pipeline, each table whole on a rank."""
    model = Ranker(to_torchrec(fixed_collection()))
    apply_optimizer_in_backward(FusedRowWiseAdagrad, model.tables.embeddings.parameters(), {"lr": LR, "eps": 1e-8})  # pyright: ignore
    fused = [EmbeddingComputeKernel.FUSED.value]
    table_wise = ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=fused)
    dmp = planned(model, {"item": table_wise, "seen": table_wise})
    fill_shards(dmp, to_torchrec(fixed_collection()))
    pipeline = TrainPipelineSparseDist(dmp, dmp.fused_optimizer, torch.device("cpu"), pipeline_postproc=True)
    batches = iter([fixed_batch(step, rank) for step in range(3)])
    outputs = [pipeline.progress(batches).detach().clone() for _ in range(3)]
    forwards: list[Any] = [module.forward for module in pipeline._pipelined_modules]
    shards: dict[str, Tensor] = {}
    states: list[dict[str, Any]] = [dmp.state_dict(), *dmp.fused_optimizer.state_dict()["state"].values()]
    for state in states:
        for name, value in state.items():
            local = value.local_shards() if hasattr(value, "local_shards") else []
            if local:
                shards[name] = local[0].tensor.detach().clone()
    return {"outputs": outputs, "pipelined": [forward.name for forward in forwards], "shards": shards}


def refusals() -> list[str]:
    """Return what fill_shards says to models that cannot take the state over."""
    said = []
    fused, dense = [EmbeddingComputeKernel.FUSED.value], [EmbeddingComputeKernel.DENSE.value]
    for kind, sharding, kernels in (
        (torch.optim.SGD, ShardingType.TABLE_WISE, fused),
        (FusedRowWiseAdagrad, ShardingType.COLUMN_WISE, fused),
        (FusedRowWiseAdagrad, ShardingType.DATA_PARALLEL, dense),
    ):
        model = Ranker(to_torchrec(wide_collection()))
        apply_optimizer_in_backward(kind, model.tables.embeddings.parameters(), {"lr": LR})  # pyright: ignore
        constraint = ParameterConstraints(sharding_types=[sharding.value], compute_kernels=kernels, min_partition=4)
        dmp = planned(model, {"wide": constraint})
        try:
            fill_shards(dmp, to_torchrec(wide_collection()))
            said.append("")
        except ConfigError as error:
            said.append(str(error))
        fill_shards(dmp, to_torchrec(wide_collection()), states=False)
        ids = KeyedJaggedTensor.from_lists({"wide": [[1], [3, 4]]}).to_torchrec()
        torch.testing.assert_close(dmp(ids)[1].detach(), to_torchrec(wide_collection())(ids).values().detach())
    return said


def unpooled() -> Tensor:
    """Return the vectors that a sharded export of an EmbeddingCollection gives, filled with another's rows."""
    exports = []
    for seed in (8, 9):
        config = TableConfig(name="path", features=("path",), embedding_dim=4, optimizer=Sgd(lr=LR))
        collection = EmbeddingCollection([config], seed=seed)
        collection(KeyedJaggedTensor.from_lists({"path": [[1, 2, 3]]}))
        collection.end_step(1)
        exports.append(to_torchrec(collection))
    apply_optimizer_in_backward(torch.optim.SGD, exports[0].embeddings.parameters(), {"lr": LR})
    fused = [EmbeddingComputeKernel.FUSED.value]
    constraint = ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=fused)
    dmp = planned(exports[0], {"path": constraint})
    fill_shards(dmp, exports[1])
    ids = KeyedJaggedTensor.from_lists({"path": [[1, 4], [3]]}).to_torchrec()
    want = exports[1](ids)["path"].values().detach()
    torch.testing.assert_close(dmp(ids)["path"].values().detach(), want)
    return want


def wide_collection() -> EmbeddingBagCollection:
    """Return a collection of one table of width 8 with a few rows."""
    config = TableConfig(name="wide", features=("wide",), embedding_dim=8, optimizer=RowWiseAdagrad(lr=LR))
    collection = EmbeddingBagCollection([config], seed=8)
    collection(KeyedJaggedTensor.from_lists({"wide": [[1, 2, 3]]}))
    collection.end_step(1)
    return collection


def rank_main(rank: int, folder: Path) -> None:
    """Be one rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE)
    for kind in ("plain", "pipeline", "freed"):
        dmp, results = train(rank, kind=kind)
        if kind == "plain":
            save(dmp, folder)
            results["forgot"] = forgets_to_step(dmp, rank)
        torch.save(results, folder / f"{kind}-{rank}.pt")
        del dmp
    results = train_exported(rank) | {"refusals": refusals(), "unpooled": unpooled()}
    torch.save(results, folder / f"exported-{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; how a process group is left while DDP objects live is not what this job is about


def main() -> int:
    """Fork the ranks and return 0 if both ended well."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    pids = []
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            rank_main(rank, folder)
        pids.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


if __name__ == "__main__":
    sys.exit(main())
