"""Towers: what keeping vectors and states saves an epoch, where a joint step's time goes, how much of a batch is padding.

    pytest benchmarks/test_towers.py --benchmark-json=out.json

The encoder has MiniLM's shape (6 layers, hidden 384) and random weights: time does not depend on them. Titles are words drawn
by a power law, 3 to 12 of them; items are drawn by Zipf's law, as in a log. `cached` reads kept vectors by id, `uncached` runs
the encoder on the batch's texts, as one does without a cache; both train the same projection and give the same losses.
"""

import time
from collections import defaultdict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from recis.bench.harness import keep
from recis.embedding import TableConfig
from recis.io import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam
from recis.recipes.item_text import fresh_encoder
from recis.towers import (
    ByPart,
    CutEncoder,
    CutTowerConfig,
    EmbeddingTowerConfig,
    Part,
    TextTowerConfig,
    WithTowers,
    precompute,
)
from recis.towers.batching import length_batches, padding_waste
from recis.trainer import DenseAdamW, TrainConfig, Trainer

NUM_ITEMS, BATCH, NUM_BATCHES, WIDTH = 600, 256, 4, 32
GOAL = 20.0


@pytest.fixture(scope="module")
def titles() -> list[str]:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(5, 2005)
    words = rng.choice(2000, size=(NUM_ITEMS, 12), p=weights / weights.sum())
    lengths = rng.integers(3, 13, NUM_ITEMS)
    return [" ".join(f"word{w}" for w in row[:n]) for row, n in zip(words, lengths, strict=True)]


@pytest.fixture(scope="module")
def folders(titles, tmp_path_factory):
    """Folder with `encoder`, `vectors` and `states`."""
    home = tmp_path_factory.mktemp("towers")
    fresh_encoder(titles, home / "encoder", hidden=384, num_layers=6)
    precompute(text(home).build().eval(), np.arange(NUM_ITEMS), titles, home / "vectors")
    precompute(CutEncoder(text(home, frozen_layers=5).build()), np.arange(NUM_ITEMS), titles, home / "states")
    return home


def text(home, **changes) -> TextTowerConfig:
    given = {"name": "title", "column": "tokens", "path": str(home / "encoder"), "out_width": WIDTH, "max_tokens": 32}
    return TextTowerConfig(**{**given, **changes})


def batches(home, titles) -> list[Batch]:
    """The batches of one epoch, tokenised as the reader's threads do it."""
    tokenizer = text(home).build()
    tokens = tokenizer.tokenize(titles)
    rng = np.random.default_rng(1)
    weights = (np.arange(NUM_ITEMS) + 10.0) ** -1.0
    made = []
    for _ in range(NUM_BATCHES):
        items = rng.choice(NUM_ITEMS, BATCH, p=weights / weights.sum())
        own = [tokens[item] for item in items]
        made.append(
            Batch(
                sparse=KeyedJaggedTensor.from_jagged(
                    {"item": JaggedTensor.from_lists([[int(item)] for item in items])}, stride=BATCH
                ),
                dense=torch.zeros(BATCH, 0),
                dense_keys=(),
                dense_widths=(),
                labels=torch.from_numpy((items % 2).astype(np.float32))[:, None],
                label_mask=None,
                label_weights=None,
                weights=torch.ones(BATCH),
                group_ids=None,
                extras={"tokens": JaggedTensor.from_lists(own)},
                num_samples=BATCH,
            )
        )
    return made


def trainer_of(tower, *, own: bool) -> Trainer:
    table = TableConfig(name="item", features=("item",), embedding_dim=17, optimizer=Adam(lr=1e-3))
    ranker = DeepFMConfig(tables=(table,), dense=(DenseInput("title", WIDTH),), hidden=(64,))
    part = Part(name="title", optimizer=DenseAdamW(lr=1e-3))
    return Trainer(
        TrainConfig(
            name="bench",
            model=WithTowers(ranker=ranker, towers=(tower,)),
            train_data=_Nothing(),
            dense_optimizer=ByPart(parts=(part,) if own else ()),
        ),
        quiet=True,
    )


class _Nothing:
    def __iter__(self):
        return iter(())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def epoch(trainer: Trainer, data: list[Batch]) -> list[float]:
    return [float(trainer.train_step([batch]).loss) for batch in data]


def seconds_of(run, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return found


@pytest.mark.parametrize("kind", ["frozen", "top layer trained"])
def test_epochs_with_and_without_a_cache(benchmark, folders, titles, kind):
    data = batches(folders, titles)
    if kind == "frozen":
        cached = EmbeddingTowerConfig(name="title", column="item", path=str(folders / "vectors"), out_width=WIDTH)
        uncached = text(folders)
    else:
        uncached = text(folders, frozen_layers=5)
        cached = CutTowerConfig(tower=replace(uncached, column="item"), path=str(folders / "states"))
    ours, theirs = trainer_of(cached, own=True), trainer_of(uncached, own=True)
    for trainer in (ours, theirs):  # the same start: projections are drawn by their towers
        trainer.model.get_submodule("towers.title.projection").load_state_dict(
            theirs.model.get_submodule("towers.title.projection").state_dict()
        )
        with torch.no_grad():
            trainer.model.get_submodule("gates").get_parameter("title").fill_(1.0)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    losses = epoch(ours, data), epoch(theirs, data)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # vectors and states are kept in float16
    times = {
        "cached": seconds_of(partial(epoch, ours, data), 7),
        "uncached": seconds_of(partial(epoch, theirs, data), 2),
    }
    benchmark.pedantic(partial(epoch, ours, data), rounds=1, iterations=1)
    info = keep(
        benchmark,
        case=f"{kind}: epoch of {NUM_BATCHES} batches of {BATCH}, {NUM_ITEMS} items, encoder 6 x 384",
        ours="cached",
        seconds=times,
        items=NUM_BATCHES * BATCH,
        targets={"uncached": GOAL} if kind == "frozen" else {},
        extra={"losses_cached": losses[0], "losses_uncached": losses[1]},
    )
    print(f"\n{kind}: cached {info['ratio_to']['uncached']:.1f}x as fast")


def test_a_joint_step_by_part(benchmark, folders, titles):
    data = batches(folders, titles)
    trainer = trainer_of(text(folders, frozen_layers=5, micro_batch_tokens=8192), own=True)
    spent: defaultdict[str, float] = defaultdict(float)
    tower = trainer.model.get_submodule("towers.title")
    begun = {}
    tower.register_forward_pre_hook(lambda *_: begun.__setitem__("tower", time.perf_counter()))
    tower.register_forward_hook(lambda *_: _add(spent, "tower, forward", begun["tower"]))
    trainer.model.register_forward_pre_hook(lambda *_: begun.__setitem__("model", time.perf_counter()))
    trainer.model.register_forward_hook(lambda *_: _add(spent, "forward", begun["model"]))
    for name, optimizer in (("dense", trainer.dense_optimizer), ("rows", trainer.sparse_optimizer)):
        optimizer.register_step_pre_hook(lambda *_, name=name: begun.__setitem__(name, time.perf_counter()))
        optimizer.register_step_post_hook(lambda *_, name=name: _add(spent, f"optimizer, {name}", begun[name]))
    epoch(trainer, data)
    spent.clear()
    total = seconds_of(partial(epoch, trainer, data), 2)
    steps = 2 * NUM_BATCHES
    parts = {name: value / steps for name, value in spent.items()}
    parts["ranker and lookup, forward"] = parts.pop("forward") - parts["tower, forward"]
    parts["backward and the rest"] = sum(total) / steps - sum(parts.values())
    assert all(value >= 0 for value in parts.values())
    benchmark.pedantic(partial(epoch, trainer, data), rounds=1, iterations=1)
    keep(
        benchmark,
        case=f"joint step, batch {BATCH}, top layer of 6 x 384 trained, no cache",
        ours="step",
        seconds={"step": [value / NUM_BATCHES for value in total]},
        items=BATCH,
        extra={"parts_ms": {name: round(1e3 * value, 2) for name, value in sorted(parts.items())}},
    )
    print("\n" + "\n".join(f"  {name:<28}{1e3 * value:>9.1f} ms" for name, value in sorted(parts.items())))


def _add(spent, name: str, begun: float) -> None:
    spent[name] += time.perf_counter() - begun


@pytest.mark.parametrize("num", [600, 20_000])
def test_padding_of_batches_by_token_count(benchmark, num):
    rng = np.random.default_rng(0)
    lengths = np.minimum(3 + rng.geometric(0.1, num), 64).tolist()
    made = partial(length_batches, lengths, max_tokens=8192)
    found = made()
    waste = padding_waste(lengths, found)
    assert sorted(at for batch in found for at in batch) == list(range(num))
    assert waste <= 0.05
    arrival = [list(range(first, min(first + 256, num))) for first in range(0, num, 256)]
    benchmark.pedantic(made, rounds=3, iterations=1)
    keep(
        benchmark,
        case=f"{num} texts of 4 to 64 tokens, 8192 cells a batch",
        ours="length_batches",
        seconds={"length_batches": seconds_of(made, 3)},
        items=num,
        extra={"waste": round(waste, 4), "waste_in_order_of_arrival": round(padding_waste(lengths, arrival), 4)},
    )
