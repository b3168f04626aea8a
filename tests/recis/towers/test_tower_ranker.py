"""Towers under a ranker and the trainer: the first output is the ranker's without them, then the gate opens."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from batch_source import BatchSource
from torch import nn

from recis.embedding import TableConfig
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.dcn import DcnConfig
from recis.models.deepfm import DeepFMConfig
from recis.models.dlrm import DlrmConfig
from recis.models.inputs import DenseInput
from recis.models.multitask import MmoeConfig
from recis.towers.optimizer import GroupedAdamW
from recis.towers.ranker import WithTowers, take_over
from recis.towers.text import TextTowerConfig
from recis.trainer import TrainConfig, Trainer

TABLES = (TableConfig(name="user", features=("user",), embedding_dim=4),)
PRICE = (DenseInput("price"),)
RANKERS = {
    "deepfm": DeepFMConfig(tables=TABLES, dense=PRICE, hidden=(8,)),
    "dlrm": DlrmConfig(tables=TABLES, dense=PRICE, bottom_hidden=(8,), top_hidden=(8,)),
    "dcn_stacked": DcnConfig(tables=TABLES, dense=PRICE, hidden=(8,), stacked=True),
    "mmoe": MmoeConfig(tables=TABLES, dense=PRICE, num_tasks=1),
}


@dataclass(frozen=True)
class LengthTower:
    """A tower that needs no model: its vector is (3, -2) times the number of letters."""

    name: str = "title"

    def build(self) -> nn.Module:
        class Module(nn.Module):
            width = 2

            def forward(self, batch):
                return batch.extras["text"].lengths.float()[:, None] * torch.tensor([3.0, -2.0])

        return Module()


def batch_of(seed: int, size: int = 8, words: tuple[str, ...] = ("w1", "w2 w3", "w7 w9 w9")) -> Batch:
    """Labels follow the text alone."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(words), (size,), generator=generator)
    user = torch.randint(0, 5, (size, 1), generator=generator)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({"user": JaggedTensor.from_lists(user.tolist())}, stride=size),
        dense=torch.randn(size, 1, generator=generator), dense_keys=("price",), dense_widths=(1,),
        labels=(picks == 1).float()[:, None], label_mask=None, label_weights=None, weights=torch.ones(size), group_ids=None,
        extras={"text": JaggedTensor.from_strings([words[pick] for pick in picks.tolist()])}, num_samples=size,
    )  # fmt: skip


def listed(ranker, width: int = 2):
    return replace(ranker, dense=(*ranker.dense, DenseInput("title", width)))


@pytest.mark.parametrize("name", RANKERS)
def test_first_output_is_that_of_the_ranker_without_the_tower(name):
    torch.manual_seed(1)
    without = RANKERS[name].build().eval()
    wide = WithTowers(ranker=listed(RANKERS[name]), towers=(LengthTower(),)).build().eval()
    batch = batch_of(0)
    take_over(wide, without, batch)
    torch.testing.assert_close(wide(batch), without(batch), rtol=1e-5, atol=1e-6)
    other = replace(batch, extras={"text": JaggedTensor.from_strings(["other text"] * 8)})
    assert torch.equal(wide(other), wide(batch))
    with torch.no_grad():
        wide.gates["title"].fill_(0.5)
    assert not torch.allclose(wide(other), wide(batch))


def test_take_over_refuses_what_does_not_agree():
    dcn = DcnConfig(tables=TABLES, dense=PRICE, hidden=(8,), stacked=False)
    torch.manual_seed(1)
    without, wide = dcn.build(), WithTowers(ranker=listed(dcn), towers=(LengthTower(),)).build()
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(ConfigError, match="give different outputs"):
        take_over(wide, without, batch_of(0))
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
    with pytest.raises(ConfigError, match="different parameters"):
        take_over(wide, RANKERS["deepfm"].build(), batch_of(0))


def test_the_trainer_opens_the_gate(bert_folder, tmp_path):
    tower = TextTowerConfig(name="title", column="text", path=str(bert_folder), out_width=4, frozen_layers=1)
    model = WithTowers(ranker=listed(RANKERS["deepfm"], 4), towers=(tower,))
    run = TrainConfig(
        name="run", model=model, train_data=BatchSource(batch_of, 30), dense_optimizer=GroupedAdamW(lr=0.05)
    )
    trainer = Trainer(run, tmp_path / "run", quiet=True)
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    first = trainer.train_step([batch_of(0)]).outputs[0].detach()
    plain = replace(run, model=listed(RANKERS["deepfm"], 4))
    zeros = Trainer(plain, quiet=True)
    batch = batch_of(0)
    dense = torch.cat([batch.dense, torch.zeros(8, 4)], dim=1)
    told = replace(batch, dense=dense, dense_keys=("price", "title"), dense_widths=(1, 4))
    assert torch.equal(zeros.train_step([told]).outputs[0].detach(), first)
    trainer.train()
    gate = trainer.model.get_submodule("gates").get_parameter("title")
    assert abs(gate.item()) > 0.01
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.model.named_parameters() if name in frozen)
    again = Trainer(replace(run, train_data=BatchSource(batch_of, 30)), tmp_path / "run", resume=True, quiet=True)
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    again.close()


def test_bad_lists_of_towers():
    with pytest.raises(ConfigError, match="no DenseInput of the ranker is called 'title'"):
        WithTowers(ranker=RANKERS["deepfm"], towers=(LengthTower(),)).build()
    with pytest.raises(ConfigError, match="has width 3; the tower gives 2"):
        WithTowers(ranker=listed(RANKERS["deepfm"], 3), towers=(LengthTower(),)).build()
    with pytest.raises(ConfigError, match="distinct names"):
        WithTowers(ranker=RANKERS["deepfm"], towers=(LengthTower(), LengthTower()))
    wide = WithTowers(ranker=listed(RANKERS["deepfm"]), towers=(LengthTower(),)).build()
    batch = batch_of(0)
    taken = replace(batch, dense=torch.zeros(8, 2), dense_keys=("title",), dense_widths=(2,))
    with pytest.raises(ConfigError, match="a dense feature 'title' of its own"):
        wide(taken)
