"""Tables of one optimizer in one table-batched embedding of FBGEMM on the CPU: lookup, update, rows out.

    FusedGroup    FBGEMM's own update, fused with its backward: SGD, Adagrad, row-wise Adagrad
    AdamGroup     FBGEMM's dense form and Adam on the rows of the batch

FBGEMM has no CPU version of Adam's update, so the second one waits until backward has filled a gradient as large as the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from recis.embedding import TableConfig
from recis.jagged import KeyedJaggedTensor
from recis.optim.config import Adagrad, RowOptimizer, RowWiseAdagrad, Sgd
from recis.torchrec.vocabulary import FixedVocabulary
from recis_kernels.bag_factors import bag_factors

FUSED: dict[type[RowOptimizer], EmbOptimType] = {
    Sgd: EmbOptimType.EXACT_SGD,
    Adagrad: EmbOptimType.EXACT_ADAGRAD,
    RowWiseAdagrad: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


@dataclass(slots=True)
class StaticRows:
    """What one table starts from: ids [V] ascending, weights [V, D], states [V, width] by name, steps so far."""

    config: TableConfig
    ids: Tensor
    weight: Tensor
    states: dict[str, Tensor]
    t: int


class TableGroup(nn.Module):
    """Tables of one optimizer in one TBE.

    Attributes:
        tables, features: names; the features in the order they are looked up.
        num_steps: updates so far, those of the table set the rows came from included.
    """

    tbe: Any

    def __init__(self, rows: Sequence[StaticRows], features: Sequence[str], feature_tables: Sequence[int]) -> None:
        super().__init__()
        self.tables, self.features = [part.config.name for part in rows], list(features)
        self.optimizer: Any = rows[0].config.optimizer
        self.feature_tables = list(feature_tables)
        self._dims = [rows[table].config.embedding_dim for table in feature_tables]
        self._num_rows = [part.ids.numel() for part in rows]
        self.register_buffer("t", torch.tensor(rows[0].t))
        self.tbe = self._make(rows)
        with torch.no_grad():
            for part, weights in zip(rows, self.weights(), strict=True):
                weights[: part.ids.numel()].copy_(part.weight)
                weights[part.ids.numel() :].zero_()

    def _make(self, rows: Sequence[StaticRows]) -> Any:
        raise NotImplementedError("a group says in which form of FBGEMM's tables it lies")

    def weights(self) -> list[Tensor]:
        """Return views of the tables' weights, [max(V, 1), D] each."""
        return self.tbe.split_embedding_weights()

    def states(self) -> list[dict[str, Tensor]]:
        """Return views of the tables' optimizer states, [max(V, 1), width] each, by our names."""
        raise NotImplementedError("a group says where its optimizer state lies")

    @property
    def num_steps(self) -> int:
        return int(self.get_buffer("t"))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate from the next backward on."""
        raise NotImplementedError("a group says where its learning rate lies")

    def rows_of(self, table: str) -> dict[str, Tensor]:
        """Return copies of a table's weights and states."""
        place = self.tables.index(table)
        fields = {"weight": self.weights()[place]}
        fields |= {f"state.{name}": value for name, value in self.states()[place].items()}
        return {name: value[: self._num_rows[place]].clone() for name, value in fields.items()}

    def look_up(self, part: KeyedJaggedTensor, vocabulary: FixedVocabulary, means: Sequence[bool]) -> dict[str, Tensor]:
        """Return the pooled vectors of a batch of this group's features, in their order.

        Ids outside the vocabulary count in a mean and add nothing: their positions are taken out after the factors.
        """
        offsets = part.offsets.long()
        mean = torch.tensor(means) if len(set(means)) > 1 else bool(means and means[0])
        num_positions = int(offsets[-1])
        factors = bag_factors(offsets, part.weights, mean, num_positions=num_positions)
        rows, is_known = [], []
        for place, (start, stop) in zip(self.feature_tables, pairwise(part.offset_per_key), strict=True):
            table = self.tables[place]
            rows.append(vocabulary.rows_of(table, part.values[start:stop]))
            is_known.append(rows[-1] < vocabulary.ids(table).numel())
        flat, known = torch.cat(rows), torch.cat(is_known)
        if not bool(known.all()):
            before = torch.zeros(num_positions + 1, dtype=torch.int64)
            torch.cumsum(known, 0, out=before[1:])
            flat, offsets = flat[known], before[offsets]
            factors = None if factors is None else factors[:num_positions][known]
        pooled = self._pooled(flat, offsets, factors)
        return dict(zip(self.features, pooled.split(self._dims, dim=1), strict=True))

    def _pooled(self, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        return self.tbe(rows, offsets, per_sample_weights=factors)


class FusedGroup(TableGroup):
    """FBGEMM's own update, fused with its backward."""

    def _make(self, rows: Sequence[StaticRows]) -> Any:
        build: Any = SplitTableBatchedEmbeddingBagsCodegen
        more = {"eps": self.optimizer.eps} if isinstance(self.optimizer, Adagrad) else {}
        tbe = build(
            [(*_shape(part), EmbeddingLocation.HOST, ComputeDevice.CPU) for part in rows],
            feature_table_map=self.feature_tables,
            optimizer=FUSED[type(self.optimizer)],
            learning_rate=self.optimizer.lr,
            **more,
        )
        for part, states in zip(rows, tbe.split_optimizer_states(), strict=False):  # SGD has none
            states[0].fill_(self.optimizer.h0)
            states[0][: part.ids.numel()].view_as(part.states["h"]).copy_(part.states["h"])
        return tbe

    def states(self) -> list[dict[str, Tensor]]:
        found = self.tbe.split_optimizer_states()
        return [{"h": states[0].view(states[0].shape[0], -1)} for states in found] or [{} for _ in self.tables]

    def set_lr(self, lr: float) -> None:
        self.tbe.set_learning_rate(lr)

    def _pooled(self, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        pooled = super()._pooled(rows, offsets, factors)
        if pooled.requires_grad:
            pooled.register_hook(lambda _: self._count())
        return pooled

    def _count(self) -> None:
        self.get_buffer("t").add_(1)


class AdamGroup(TableGroup):
    """FBGEMM's dense TBE, and Adam on the rows of the batch when backward has filled the gradient.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """

    def _make(self, rows: Sequence[StaticRows]) -> Any:
        build: Any = DenseTableBatchedEmbeddingBagsCodegen
        tbe = build([_shape(part) for part in rows], feature_table_map=self.feature_tables, use_cpu=True)
        for number, part in enumerate(rows):
            for name in ("m", "v"):
                state = torch.zeros(_shape(part))
                state[: part.ids.numel()] = part.states[name]
                self.register_buffer(f"{name}_{number}", state)
        self._lr = self.optimizer.lr
        self._touched: list[tuple[Tensor, Tensor]] = []
        tbe.weights.register_post_accumulate_grad_hook(self._update)
        return tbe

    def states(self) -> list[dict[str, Tensor]]:
        names = ("m", "v")
        return [{name: self.get_buffer(f"{name}_{number}") for name in names} for number in range(len(self.tables))]

    def set_lr(self, lr: float) -> None:
        self._lr = lr

    def _pooled(self, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        stride = (offsets.numel() - 1) // len(self.features)
        starts = offsets[::stride] if stride else offsets.new_zeros(len(self.features) + 1)
        pooled = super()._pooled(rows, offsets, factors)
        if pooled.requires_grad:
            pooled.register_hook(lambda _: self._touched.append((rows, starts)))
        return pooled

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        touched, self._touched = self._touched, []
        t = self.get_buffer("t").add_(1)
        beta1, beta2 = self.optimizer.betas
        corrected1, corrected2 = 1 - beta1 ** int(t), 1 - beta2 ** int(t)
        first = 0
        for number, weights in enumerate(self.weights()):
            grads = parameter.grad[first : first + weights.numel()].view_as(weights)
            first += weights.numel()
            rows = [
                flat[starts[place] : starts[place + 1]]
                for flat, starts in touched
                for place, table in enumerate(self.feature_tables)
                if table == number
            ]
            at = torch.cat(rows).unique()
            g = grads[at]
            m, v = (self.get_buffer(f"{name}_{number}") for name in ("m", "v"))
            m[at] = beta1 * m[at] + (1 - beta1) * g
            v[at] = beta2 * v[at] + (1 - beta2) * g * g
            weights[at] -= self._lr * (m[at] / corrected1) / ((v[at] / corrected2).sqrt() + self.optimizer.eps)
        parameter.grad = None


def _shape(part: StaticRows) -> tuple[int, int]:
    return max(part.ids.numel(), 1), part.config.embedding_dim
