"""Frozen backbones in checkpoints: their hash stands for them, another backbone is refused; and the memory report."""

import shutil
from dataclasses import replace

import pytest
import torch
from batch_source import BatchSource

from recis.checkpoint import latest, read_manifest
from recis.embedding import TableConfig
from recis.errors import CheckpointError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam
from recis.towers.cut import CutEncoder, CutTowerConfig
from recis.towers.memory import measure_memory, memory_report
from recis.towers.optimizer import ByPart, Part
from recis.towers.precomputation import precompute
from recis.towers.ranker import WithTowers
from recis.towers.text import TextTowerConfig
from recis.trainer import DenseAdamW, DenseSgd, TrainConfig, Trainer

RANKER = DeepFMConfig(
    tables=(TableConfig(name="user", features=("user",), embedding_dim=4, optimizer=Adam(lr=0.01)),),
    dense=(DenseInput("title", 3),),
    hidden=(8,),
)
TEXTS = ["w1 w2", "w3", "w4 w5 w6"]


def batch_of(seed: int) -> Batch:
    picks = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(seed))
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({"user": JaggedTensor.from_lists([[int(p)] for p in picks])}, stride=8),
        dense=torch.zeros(8, 0), dense_keys=(), dense_widths=(), labels=(picks == 1).float()[:, None],
        label_mask=None, label_weights=None, weights=torch.ones(8), group_ids=None,
        extras={"text": JaggedTensor.from_strings([TEXTS[p] for p in picks]), "item": picks}, num_samples=8,
    )  # fmt: skip


def run_config(tower) -> TrainConfig:
    part = Part(name="title", optimizer=DenseSgd(lr=0.1), every_steps=4)
    return TrainConfig(
        name="run",
        model=WithTowers(ranker=RANKER, towers=(tower,)),
        train_data=BatchSource(batch_of, 6),
        dense_optimizer=ByPart(rest=DenseAdamW(lr=0.05), parts=(part,)),
    )


def tower_of(folder, **changes) -> TextTowerConfig:
    return TextTowerConfig(
        **{"name": "title", "column": "text", "path": str(folder), "out_width": 3, "frozen_layers": 1, **changes}
    )


@pytest.fixture
def trained(bert_folder, tmp_path):
    """(config, trainer, run folder) of a finished run."""
    config = run_config(tower_of(bert_folder))
    trainer = Trainer(config, tmp_path / "run", quiet=True)
    trainer.train()
    return config, trainer, tmp_path / "run"


def test_a_checkpoint_has_a_hash_for_what_does_not_train(trained):
    _, trainer, run = trained
    newest = latest(run)
    assert newest is not None
    dense = read_manifest(newest).dense
    assert "towers.title.frozen_sha256" in dense
    frozen = {name for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert frozen
    assert not frozen & dense.keys()
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} <= dense.keys()


def test_one_run_has_the_same_weights_straight_and_resumed_between_two_updates_of_the_tower(trained, tmp_path):
    config, straight, _ = trained
    first = Trainer(replace(config, train_data=BatchSource(batch_of, 6), max_steps=2), tmp_path / "half", quiet=True)
    first.train()
    shutil.copytree(tmp_path / "half", tmp_path / "again")
    text = (tmp_path / "half" / "config.json").read_text().replace('"max_steps": 2', '"max_steps": null')
    (tmp_path / "half" / "config.json").write_text(text)
    second = Trainer(replace(config, train_data=BatchSource(batch_of, 6)), tmp_path / "half", resume=True, quiet=True)
    second.train()
    want = straight.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in second.model.state_dict().items())


def test_another_backbone_is_refused_and_nothing_is_loaded(trained, tiny, tmp_path):
    _, _, run = trained
    tiny.bert(initializer_range=0.5).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    other = Trainer(run_config(tower_of(tmp_path / "other")), quiet=True)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"frozen weights of towers\.title\.\* had SHA-256"):
        other.load(run)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_a_tower_on_kept_states_takes_the_checkpoint_of_the_whole_tower(trained, bert_folder, tmp_path):
    _, whole, run = trained
    tower = tower_of(bert_folder, column="item")
    precompute(CutEncoder(tower.build()), [0, 1, 2], TEXTS, tmp_path / "states")
    cut = Trainer(run_config(CutTowerConfig(tower=tower, path=str(tmp_path / "states"))), quiet=True)
    cut.load(run)
    batch = batch_of(9)
    whole.model.eval()
    cut.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(cut.model(batch), whole.model(batch), rtol=1e-3, atol=1e-3)


def test_memory_by_hand(trained):
    _, trainer, _ = trained
    parts = {part.name: part for part in measure_memory(trainer.model, trainer.dense_optimizer, trainer.tables)}
    ranker = sum(v.numel() for n, v in trainer.model.named_parameters() if n.startswith("ranker.") and v.requires_grad)
    assert parts["ranker"].trained == 4 * ranker
    assert parts["ranker"].optimizer == 4 * (
        2 * ranker + len(list(trainer.model.get_submodule("ranker").parameters()))
    )  # AdamW: two moments, one step count a tensor
    assert parts["table user"].trained == 3 * 4 * 4
    assert parts["table user"].optimizer == 2 * 3 * 4 * 4
    assert parts["title"].frozen > 0
    shown = memory_report(trainer.model, trainer.dense_optimizer, trainer.tables)
    assert [line.split()[0] for line in shown.splitlines()] == ["memory,", "table", "ranker", "title", "gates", "peak"]
