"""Speed of a whole training step: 26 features x 4096 samples x 3 ids, D = 32, an MLP of 256, binary cross-entropy.

    make bench, or: pytest benchmarks/test_train_step.py --benchmark-json=out.json

Ours is `Trainer.train_step` on a dynamic table per feature: ids are arbitrary 64-bit numbers, looked up, pooled, trained by
row-wise Adagrad, with admission, counters and the end of the step included. The peers get row numbers: torchrec's
FusedEmbeddingBagCollection (FBGEMM TBE with the optimizer fused) and 26 torch.nn.EmbeddingBag with sparse Adagrad. The dense
part is the same module everywhere, trained by AdamW. All start from equal weights and must agree after some steps.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recis.bench.harness import at_threads, compare
from recis.embedding import Constant, EmbeddingBagCollection, TableConfig
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adagrad, RowWiseAdagrad
from recis.trainer import DenseAdamW, TrainConfig, Trainer

NUM_FEATURES, BATCH, BAG_SIZE, DIM, HIDDEN = 26, 4096, 3, 32, 256
NUM_ROWS = 100_000  # per feature
NUM_DENSE = 13
NUM_BATCHES = 4  # in turn, so that no step finds the rows of the one before in cache
LR, EPS = 0.01, 1e-8
KEYS = tuple(f"f{number}" for number in range(NUM_FEATURES))
TORCHREC = find_spec("torchrec") is not None and find_spec("fbgemm_gpu") is not None
MISSING = () if TORCHREC else ("torchrec FusedEmbeddingBagCollection",)


@cache
def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (row numbers [F * B * 3], key-major; dense [B, 13]; labels [B, 1]) per batch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(NUM_BATCHES):
        rows = torch.randint(0, NUM_ROWS, (NUM_FEATURES * BATCH * BAG_SIZE,), generator=generator)
        dense = torch.randn(BATCH, NUM_DENSE, generator=generator)
        found.append((rows, dense, (torch.rand(BATCH, 1, generator=generator) < 0.25).float()))
    return found


@cache
def first_weights(feature: int) -> Tensor:
    """Return the weights that every implementation starts a feature's table from, [NUM_ROWS, DIM]."""
    return torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(feature)) * 0.01


@cache
def row_ids() -> Tensor:
    """Return the 64-bit id that stands for each row number of our tables, [NUM_ROWS]."""
    return torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,), generator=torch.Generator().manual_seed(99))


class Dense(nn.Sequential):
    """The part that all implementations share: [B, 26 * 32 + 13] -> logits [B, 1]."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        width = NUM_FEATURES * DIM + NUM_DENSE
        super().__init__(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


class OurModel(nn.Module):
    """Dynamic tables in front of Dense."""

    def __init__(self, optimizer: RowWiseAdagrad | Adagrad) -> None:
        super().__init__()
        tables = [
            TableConfig(name=key, features=(key,), embedding_dim=DIM, optimizer=optimizer, initializer=Constant(0.0))
            for key in KEYS
        ]
        self.embeddings = EmbeddingBagCollection(tables, seed=0)
        self.dense = Dense()

    def forward(self, batch: Batch) -> Tensor:
        return self.dense(torch.cat([*self.embeddings(batch.sparse).values(), batch.dense], dim=1))


class Ours:
    """The trainer's own step."""

    def __init__(self, optimizer: RowWiseAdagrad | Adagrad) -> None:
        model = OurModel(optimizer)
        for feature, table in enumerate(model.embeddings.table_set):
            table.reserve(NUM_ROWS)
            table.insert(row_ids(), first_weights(feature))
        lengths = torch.full((NUM_FEATURES * BATCH,), BAG_SIZE)
        self.batches = [
            Batch(
                sparse=KeyedJaggedTensor(KEYS, row_ids()[rows], lengths=lengths, stride=BATCH),
                dense=dense,
                dense_keys=("x",),
                dense_widths=(NUM_DENSE,),
                labels=labels,
                label_mask=None,
                label_weights=None,
                weights=torch.ones(BATCH),
                group_ids=None,
                extras={},
                num_samples=BATCH,
            )
            for rows, dense, labels in batches()
        ]
        config = TrainConfig(name="bench", model=lambda: model, train_data=_NoData(), dense_optimizer=DenseAdamW(lr=LR))
        self.trainer = Trainer(config, quiet=True)

    def step(self, number: int) -> float:
        return float(self.trainer.train_step([self.batches[number]]).loss)


class _NoData:
    """A source that is never read: the steps are given by hand."""

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError("a benchmark does not resume")


class Peer:
    """Pooled vectors of given rows by another library, in front of Dense."""

    def __init__(self) -> None:
        self.dense = Dense()
        self.optimizer = torch.optim.AdamW(self.dense.parameters(), lr=LR, weight_decay=0.0)

    def pooled(self, number: int) -> list[Tensor]:
        raise NotImplementedError("a library says how it pools")

    def update_rows(self) -> None:
        """Update the rows, where the library has not done so in backward."""

    def step(self, number: int) -> float:
        _, dense, labels = batches()[number]
        self.optimizer.zero_grad()
        logits = self.dense(torch.cat([*self.pooled(number), dense], dim=1))
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.update_rows()
        return float(loss.detach())


class TorchBags(Peer):
    """26 torch.nn.EmbeddingBag with sparse gradients and torch's Adagrad."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = [nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True) for _ in KEYS]
        for feature, bag in enumerate(self.bags):
            bag.weight.data.copy_(first_weights(feature))
        self.rows = torch.optim.Adagrad([bag.weight for bag in self.bags], lr=LR, eps=EPS)

    def pooled(self, number: int) -> list[Tensor]:
        self.rows.zero_grad()
        rows = batches()[number][0].view(NUM_FEATURES, BATCH, BAG_SIZE)
        return [bag(ids) for bag, ids in zip(self.bags, rows, strict=True)]

    def update_rows(self) -> None:
        self.rows.step()


class TorchrecFused(Peer):
    """torchrec's FusedEmbeddingBagCollection: FBGEMM TBE, row-wise Adagrad fused with backward."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec.modules.embedding_configs import EmbeddingBagConfig
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TorchrecAdagrad
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchrecKjt

        tables = [
            EmbeddingBagConfig(name=key, embedding_dim=DIM, num_embeddings=NUM_ROWS, feature_names=[key])
            for key in KEYS
        ]
        self.module = FusedEmbeddingBagCollection(
            tables=tables,
            optimizer_type=TorchrecAdagrad,
            optimizer_kwargs={"lr": LR, "eps": EPS},
            device=torch.device("cpu"),
        )
        for feature, (_, weight) in enumerate(sorted(self._weights().items(), key=lambda item: int(item[0][1:]))):
            weight.data.copy_(first_weights(feature))
        lengths = torch.full((NUM_FEATURES * BATCH,), BAG_SIZE)
        self.inputs = [
            TorchrecKjt(keys=list(KEYS), values=rows, lengths=lengths, stride=BATCH) for rows, _, _ in batches()
        ]

    def _weights(self) -> dict[str, Tensor]:
        return {name.split(".")[1]: value for name, value in self.module.state_dict().items() if "weight" in name}

    def pooled(self, number: int) -> list[Tensor]:
        return [self.module(self.inputs[number]).values()]


def steps_of(implementation: Ours | Peer) -> Callable[[], object]:
    """Return a function that takes the next step at each call."""
    numbers = cycle(range(NUM_BATCHES))
    return lambda: implementation.step(next(numbers))


def test_train_step(benchmark):
    peers: dict[str, Peer] = {}
    if TORCHREC:
        peers["torchrec FusedEmbeddingBagCollection"] = TorchrecFused()
    ours = Ours(RowWiseAdagrad(lr=LR, eps=EPS))
    for name, peer in peers.items():  # the losses agree only if lookups, pooling and both updates do
        want = [peer.step(number) for number in (0, 1, 0)]
        got = [ours.step(number) for number in (0, 1, 0)]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5, msg=name)
    impls = {"recis": steps_of(ours)}
    for name, peer in peers.items():
        impls[name] = steps_of(peer)
        impls[f"{name}, 1 thread"] = at_threads(1, steps_of(peer))
    num_ids = NUM_FEATURES * BATCH * BAG_SIZE
    targets = {name: 1.5 for name in impls if name != "recis"}
    compare(
        benchmark,
        case=f"train step, row-wise Adagrad, {NUM_FEATURES} x {BATCH} x {BAG_SIZE} ids, D={DIM}, MLP {HIDDEN}",
        ours="recis",
        impls=impls,
        items=num_ids,
        missing=MISSING,
        targets=targets,
    )


def test_train_step_against_torch(benchmark):
    ours, peer = Ours(Adagrad(lr=LR, eps=EPS)), TorchBags()
    want = [peer.step(number) for number in (0, 1, 0)]
    got = [ours.step(number) for number in (0, 1, 0)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5)
    impls = {
        "recis": steps_of(ours),
        "torch EmbeddingBag + sparse Adagrad": steps_of(peer),
        "torch EmbeddingBag + sparse Adagrad, 1 thread": at_threads(1, steps_of(peer)),
    }
    compare(
        benchmark,
        case=f"train step, Adagrad, {NUM_FEATURES} x {BATCH} x {BAG_SIZE} ids, D={DIM}, MLP {HIDDEN}",
        ours="recis",
        impls=impls,
        items=NUM_FEATURES * BATCH * BAG_SIZE,
    )


def test_share_of_the_dense_part(benchmark):
    """How much of our step the tables cost: the same step without them."""
    ours = Ours(RowWiseAdagrad(lr=LR, eps=EPS))
    dense = Dense()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=LR)
    inputs = torch.randn(BATCH, NUM_FEATURES * DIM + NUM_DENSE, requires_grad=True)

    def dense_step() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(dense(inputs), batches()[0][2]).backward()
        optimizer.step()

    compare(
        benchmark,
        case="train step, tables and dense part",
        ours="recis",
        impls={"recis": steps_of(ours), "dense part alone": dense_step},
    )
