"""Dynamic tables as modules of a TorchRec model: beside its static tables, under DistributedModelParallel and its pipelines.

    forward(KeyedJaggedTensor) -> awaitable of KeyedTensor [B, sum D], or of {feature: JaggedTensor of [L, D]}

Such a module is sharded from the start: TorchRec's planner places its own tables and leaves this one alone, whose ids are
dealt to the ranks by slice of hash64(id). input_dist sends ids, compute looks them up at their owners, output_dist brings the
rows back; TrainPipelineSparseDist therefore sends the next batch's ids while this batch trains, and changes no value.

Gradients are divided by the number of ranks, as TorchRec divides those of its tables, so that they suit the mean that
DistributedDataParallel makes of the dense ones. The update is not part of backward: `fused_optimizer.step()` makes it, which
all ranks call at the same time. DistributedModelParallel.fused_optimizer holds it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable, ShardedModule
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor as TorchRecJagged
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed
from torchrec.sparse.jagged_tensor import KeyedTensor
from torchrec.streamable import Multistreamable

from recis.distributed.ranks import Ranks
from recis.distributed.stages import Answer, Asked
from recis.distributed.tables import share_tables
from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, TableConfig, TableSet, Tile
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import SparseOptimizer
from recis.torchrec.jagged import jagged_to_torchrec


class RowsOptimizer(KeyedOptimizer):
    """Updates the rows of a dynamic module and ends its step; every rank calls `step` at the same time.

    Rows, their optimizer state and the count of steps lie in the module's `table_set` and are saved with it: `state` is
    empty. The numbers of each table (lr and the like) are a param group under the table's name.
    """

    def __init__(self, table_set: TableSet, accumulate_steps: int) -> None:
        self.rows = SparseOptimizer([table_set], accumulate_steps=accumulate_steps)
        self._table_set, self._accumulate_steps, self._calls = table_set, accumulate_steps, 0
        stand_ins = {group["name"]: group["params"][0] for group in self.rows.param_groups}
        super().__init__(stand_ins, {}, self.rows.param_groups)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all touched rows and end the step, or count the call while gradients accumulate.

        Raises:
            RuntimeError: called while backward runs, as by a pipeline with the optimizer in a backward hook: gradients of rows
                may still be to come, and those that come later would be lost or go into the next step.
        """
        if torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                "the rows' optimizer is stepped while backward runs, when gradients of rows may still be to come: step it "
                "behind backward (TorchRec's TrainPipelineSparseDist instead of TrainPipelineSparseDistBwdOpt)"
            )
        self.rows.step(closure)
        self._calls += 1
        if self._calls % self._accumulate_steps == 0:
            self._table_set.end_step(self._table_set.step + 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used; while they accumulate, nothing."""
        self.rows.zero_grad(set_to_none)

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Do nothing: a row's state is there as soon as the row is."""


class _Request(Multistreamable):
    """What one batch asks of the tables: per store the plan, its part of the batch, and the ids under way."""

    def __init__(self, parts: list[tuple[Any, KeyedJaggedTensor, Tensor, Asked]]) -> None:
        self.parts = parts

    def record_stream(self, stream: Any) -> None:
        """Nothing is on a stream: ids are exchanged by the CPU."""


class _Ids(Awaitable[Any]):
    """Both waits of an input_dist: the first starts the ids, the second has nothing left to start."""

    def __init__(self, request: _Request, *, started: bool = False) -> None:
        super().__init__()
        self._request, self._started = request, started

    def _wait_impl(self) -> Any:
        if self._started:
            return self._request
        for _, _, _, asked in self._request.parts:
            asked.start_ids()
        return _Ids(self._request, started=True)


class DynamicContext(Multistreamable):
    """What TorchRec carries from stage to stage of a lookup; ours need nothing beside what they hand on."""

    def record_stream(self, stream: Any) -> None:
        """Nothing is on a stream."""


class _Output(LazyAwaitable[Any]):
    """Rows on their way back; waiting pools them."""

    def __init__(self, module: "_DynamicCollection", request: _Request, answers: list[Answer]) -> None:
        super().__init__()
        self._module, self._request, self._answers = module, request, answers

    @torch.compiler.disable
    def _wait_impl(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._result is None:
            self._result = self._module._finish(self._request, self._answers)
        return self._result


class _DynamicCollection(ShardedModule[Any, Any, Any, DynamicContext], FusedOptimizerModule):
    """What both modules share."""

    _inner_type: type[EmbeddingBagCollection] | type[EmbeddingCollection]

    def __init__(
        self,
        tables: "Sequence[TableConfig] | _DynamicCollection",
        *,
        seed: int | None = None,
        features: Sequence[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        rows_dtype: torch.dtype = torch.float32,
        deterministic: bool = True,
        accumulate_steps: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        """Build the tables, or share those of another module of this kind.

        Args:
            tables: configs; or a module, whose tables, ranks and optimizer this one then shares.
            seed: of the tables' random draws; with configs.
            features: names to serve, in output order; None: see recis.embedding.
            process_group: of gloo; None: the default group if there is one, else this process alone.
            rows_dtype: type in which rows and their gradients travel.
            deterministic: see TableSet.
            accumulate_steps: only every k-th step of the optimizer acts.
            timeout_s: of the group, for messages.

        Raises:
            ConfigError: a setting breaks a rule of the tables, the group cannot move CPU tensors, or a feature is Tile(n).
        """
        super().__init__()
        if isinstance(tables, _DynamicCollection):
            table_set, self.ranks, self._accumulate_steps = tables.table_set, tables.ranks, tables._accumulate_steps
            self._optimizer: KeyedOptimizer = EmptyFusedOptimizer()
        else:
            if seed is None:
                raise ConfigError(f"{type(self).__name__}: give seed=; first weights are drawn from it")
            table_set = TableSet(tables, seed=seed, deterministic=deterministic)
            self.ranks, self._accumulate_steps = _ranks_of(process_group, timeout_s), accumulate_steps
            share_tables(table_set, self.ranks, rows_dtype=rows_dtype)
            self._optimizer = RowsOptimizer(table_set, accumulate_steps)
            features = list(table_set.features) if features is None else features
        self.rows = self._inner_type(table_set, features=features)
        # Set by a pipeline that frees a batch once its ids are under way. Pooling still needs bags and weights, and memory that
        # our loops have looked into cannot be freed: then this module works on copies.
        self._free_features_storage_early = False
        for name, feature in self.rows.features.items():
            if isinstance(feature.pooling, Tile):
                raise ConfigError(
                    f"feature {name!r} has pooling {feature.pooling}, which TorchRec's KeyedTensor cannot hold: serve it by a "
                    "DynamicEmbeddingCollection and cut its vectors"
                )

    @property
    def table_set(self) -> TableSet:
        """The tables: this rank's share of their rows."""
        return self.rows.table_set

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Updates the rows; of a module that shares another's tables it does nothing, the other's does."""
        return self._optimizer

    @property
    def unsharded_module_type(self) -> type[torch.nn.Module]:
        """This type: there is no other form of it."""
        return type(self)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield nothing: rows are no parameters."""
        yield from ()

    @torch.compiler.disable  # a compiled model calls tables as they are: their sizes depend on the ids
    def forward(self, *given: Any, **named: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look up a batch: all stages, one after the other."""
        return super().forward(*given, **named)

    # ---- the stages of a lookup

    def create_context(self) -> DynamicContext:
        """Return what TorchRec's pipelines carry from stage to stage."""
        return DynamicContext()

    def input_dist(self, ctx: DynamicContext, features: TorchRecKeyed) -> KJTListSplitsAwaitable[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start to send the ids of a batch to their owners.

        Raises:
            ValueError: ids are not int64, a feature is missing, or the batch has a stride per key.
        """
        batch = KeyedJaggedTensor.from_torchrec(features)
        if batch.values.dtype != torch.int64:
            raise ValueError(f"ids must be int64; the batch has {batch.values.dtype}: hash or cast them to int64")
        if self._free_features_storage_early:
            weights = None if batch.weights is None else batch.weights.clone()
            values, lengths = batch.values.clone(), batch.lengths.clone()
            batch = KeyedJaggedTensor(batch.keys, values, lengths, weights=weights, stride=batch.stride)
        parts = []
        for plan in self.rows._plan(batch.keys):
            part = plan.part_of(batch)
            offsets = part.offsets.long()
            starts = offsets[:: part.stride] if part.stride else offsets.new_zeros(len(plan.features) + 1)
            exchange: Any = plan.store.exchange
            ids = part.values[: int(offsets[-1])]
            parts.append((plan, part, offsets, exchange.ask((ids, starts, plan.tables))))
        awaitables: list[Any] = [_Ids(_Request(parts))]
        return KJTListSplitsAwaitable(awaitables, ctx)

    def compute(self, ctx: DynamicContext, dist_input: KJTList) -> tuple[_Request, list[Answer]]:
        """Look up at their owners what all ranks asked for, and let the rows travel."""
        request: Any = dist_input[0]
        answers = []
        for plan, _, _, asked in request.parts:
            exchange: Any = plan.store.exchange
            if self.training and exchange.num_waiting(self.rows) >= self._accumulate_steps:
                raise RuntimeError(
                    f"{plan.store.describe()}: a training lookup follows a backward whose gradients no update has used; step "
                    "DistributedModelParallel.fused_optimizer (in a CombinedOptimizer) after each backward, or give "
                    "accumulate_steps"
                )
            answers.append(exchange.answer(asked, train=self.training, source=self.rows))
        return request, answers

    def output_dist(self, ctx: DynamicContext, output: tuple[_Request, list[Answer]]) -> LazyAwaitable[Any]:
        """Return the vectors as something to wait for."""
        return _Output(self, *output)

    def _finish(self, request: _Request, answers: list[Answer]) -> Any:
        out: dict[str, Any] = {}
        for (plan, part, offsets, _), answer in zip(request.parts, answers, strict=True):
            found = answer.take()
            out |= self.rows._outputs(plan, part, offsets, found)
        return self._as_torchrec({name: out[name] for name in self.rows.features})

    def _as_torchrec(self, vectors: dict[str, Any]) -> Any:
        raise NotImplementedError("a module says what its vectors become")


class DynamicEmbeddingBagCollection(_DynamicCollection):
    """Pooled lookups in dynamic tables: KeyedTensor of [B, sum D] float32, in the order of `rows.features`."""

    _inner_type = EmbeddingBagCollection

    def _as_torchrec(self, vectors: dict[str, Tensor]) -> KeyedTensor:
        values = _divided(torch.cat(list(vectors.values()), dim=1), self.ranks.world_size)
        return KeyedTensor(list(vectors), [value.shape[1] for value in vectors.values()], values)


class DynamicEmbeddingCollection(_DynamicCollection):
    """Unpooled lookups in dynamic tables: {feature: TorchRec's JaggedTensor of [L, D] float32}."""

    _inner_type = EmbeddingCollection

    def _as_torchrec(self, vectors: dict[str, Any]) -> dict[str, TorchRecJagged]:
        return {
            name: jagged_to_torchrec(
                feature.with_values(_divided(feature.values, self.ranks.world_size), feature.weights)
            )
            for name, feature in vectors.items()
        }


def _divided(values: Tensor, world_size: int) -> Tensor:
    """Return values whose gradient is divided by the number of ranks, unless TorchRec was told not to divide its own."""
    if values.requires_grad and world_size > 1 and get_gradient_division():
        values.register_hook(lambda grad: grad / world_size)
    return values


def _ranks_of(group: dist.ProcessGroup | None, timeout_s: float) -> Ranks:
    """Return the job behind a process group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    group = dist.group.WORLD if group is None else group
    backend = dist.get_backend(group)
    if "gloo" not in backend:
        raise ConfigError(
            f"process_group is of backend {backend!r}, and rows are shared by CPU processes in this release: give a group "
            "made with dist.new_group(backend='gloo')"
        )
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group=group, timeout_s=timeout_s)
