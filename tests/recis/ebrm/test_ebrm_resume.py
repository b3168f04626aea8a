"""A training that was killed goes on to the same losses and the same weights, wherever it was killed."""

import copy
from dataclasses import replace

import pytest
import torch
from ebrm_training import CONFIG, QUERIES, ROWS, SCHEMA, Bilinear, model_of, pairs_of

from recis.ebrm import EBRM
from recis.ebrm.config import with_comparators
from recis.ebrm.descent import StepConfig
from recis.ebrm.pretrain import pretrain
from recis.ebrm.resume import TRAINING_NAME, Progress, read_settings, write_settings
from recis.ebrm.train import train
from recis.errors import ConfigError

FIRST = StepConfig(epochs=3, lr=0.05, batch_pairs=2)  # 4 rows: 2 steps an epoch
SECOND = replace(CONFIG, epochs=3)  # 36 pairs by 8: 5 steps an epoch


class Killed(BaseException):
    """Stands in for SIGKILL: nothing of ours catches it."""


class Dies(Progress):
    """Saves at every step, and dies behind the given save."""

    def __init__(self, folder, after: int) -> None:
        super().__init__(folder=folder, every_s=0.0)
        self.left = after

    def save(self, stage, state):
        super().save(stage, state)
        self.left -= 1
        if self.left == 0:
            raise Killed


def both_stages(model: EBRM, progress: Progress | None):
    pairs = pairs_of(QUERIES)
    told = []
    losses = pretrain(model, ROWS, FIRST, on_epoch=lambda *epoch: told.append(epoch), progress=progress)
    history = train(model, pairs, pairs, ROWS, SECOND, on_measure=told.append, progress=progress)
    return losses, history, told


def fresh() -> EBRM:
    return model_of(schema=with_comparators(SCHEMA, ("model",)))


@pytest.fixture(scope="module")
def straight():
    model = fresh()
    return model, *both_stages(model, None)


@pytest.mark.parametrize("after", [1, 2, 5, 6, 7, 10, 13, 20, 21])
def test_killed_at_any_save_and_resumed(tmp_path, straight, after):
    with pytest.raises(Killed):
        both_stages(fresh(), Dies(tmp_path, after))
    model = fresh()
    losses, history, told = both_stages(model, Progress(folder=tmp_path))
    want, want_losses, want_history, want_told = straight
    assert losses == want_losses
    assert history == want_history
    assert told == want_told[len(want_told) - len(told) :]  # what was told before the kill is not told again
    assert len(told) < len(want_told) or after == 1
    assert model.version == want.version
    assert torch.equal(model.pool.relaxation, want.pool.relaxation)
    assert model.calibrator == want.calibrator
    assert model.fallback("lg fridge", ["brand:lg"]).tolist() == want.fallback("lg fridge", ["brand:lg"]).tolist()


def test_killed_twice(tmp_path, straight):
    for after in (3, 8):
        with pytest.raises(Killed):
            both_stages(fresh(), Dies(tmp_path, after))
    model = fresh()
    _, history, _ = both_stages(model, Progress(folder=tmp_path))
    assert history == straight[2]
    assert model.version == straight[0].version


def test_saves_come_by_the_clock(tmp_path):
    now = [0.0]
    progress = Progress(folder=tmp_path, every_s=10.0, clock=lambda: now[0])
    assert not progress.is_due()
    now[0] = 10.0
    assert progress.is_due()
    progress.save("train", {"step": 1})
    assert not progress.is_due()
    assert progress.load("train") == {"step": 1}
    assert progress.load("pretrain") is None
    assert not Progress().is_due()
    Progress().save("train", {"step": 1})  # without a folder nothing is kept
    assert [path.name for path in (tmp_path / TRAINING_NAME).iterdir()] == ["train.pt"]
    (tmp_path / TRAINING_NAME / "train.pt").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="cannot be read"):
        progress.load("train")


def test_settings_are_kept(tmp_path):
    with pytest.raises(ConfigError, match="no unfinished training"):
        read_settings(tmp_path)
    write_settings(tmp_path, {"seed": 3})
    assert read_settings(tmp_path) == {"seed": 3}


def test_bf16_is_a_setting(straight):
    """Autocast changes the scores of an encoder; Bilinear has no matrix product, so only the plumbing is looked at."""
    with pytest.raises(ConfigError, match="precision must be fp32 or bf16"):
        replace(FIRST, precision="fp16")
    model = copy.deepcopy(fresh())
    pretrain(model, ROWS, replace(FIRST, precision="bf16"))
    assert isinstance(model.scorer, Bilinear)
    assert model.scorer.u.dtype == torch.float32
