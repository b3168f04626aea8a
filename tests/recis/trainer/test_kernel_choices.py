"""A run keeps what its kernels choose by: deterministic ones the built-in table, others that of the machine they began on."""

from dataclasses import replace

import pytest
import torch

from recis.checkpoint import latest, read_manifest
from recis.errors import CheckpointError
from recis.trainer import Trainer, persist
from recis_kernels import calibration
from recis_kernels.calibration import BUILT_IN

HERE = replace(BUILT_IN, machine="the first machine", thread_hand_over_us=5.0)
THERE = replace(BUILT_IN, machine="another machine", thread_hand_over_us=500.0)


def seen_by(trainer):
    """Return a list that takes the table that holds in each forward of the trainer's model."""
    seen = []
    trainer.model.register_forward_pre_hook(lambda *_: seen.append(calibration.current()))
    return seen


def kept_in(run):
    """Return the table in the newest checkpoint of a run."""
    newest = latest(run)
    assert newest is not None
    return calibration.from_json(read_manifest(newest).trainer["kernel_choices"])


def test_deterministic_runs_ignore_the_machine(toy, tmp_path):
    with calibration.use(HERE):
        trainer = Trainer(toy.config(max_steps=2, eval_data=toy.source([50])), tmp_path, quiet=True)
        seen = seen_by(trainer)
        trainer.train()
        assert calibration.current() is HERE
    assert seen == [BUILT_IN] * 3  # two steps and one batch of evaluation
    assert kept_in(tmp_path) == BUILT_IN


def test_a_resumed_run_uses_the_stored_choices(toy, tmp_path):
    config = toy.config(train_data=toy.source(range(10)), max_steps=2, deterministic=False)
    with calibration.use(HERE):
        first = Trainer(config, tmp_path, quiet=True)
        seen = seen_by(first)
        first.train()
    assert seen == [HERE] * 2
    longer = replace(config, train_data=toy.source(range(10)), max_steps=4)
    (tmp_path / "config.json").unlink()  # the same run with another end
    with calibration.use(THERE):
        assert Trainer(config, quiet=True).choices is THERE
        second = Trainer(longer, tmp_path, resume=True, quiet=True)
        seen = seen_by(second)
        second.train()
    assert second.state.step == 4
    assert seen == [HERE] * 2
    assert kept_in(tmp_path) == HERE


def test_choices_of_a_newer_release_are_refused(toy, tmp_path, monkeypatch):
    config = toy.config(max_steps=1)
    monkeypatch.setattr(calibration, "VERSION", 2)
    Trainer(config, tmp_path, quiet=True).train()
    monkeypatch.setattr(calibration, "VERSION", 1)
    with pytest.raises(CheckpointError, match=r"kernel choices: calibration: version must be 1\.\.1; got 2"):
        Trainer(config, tmp_path, resume=True, quiet=True)


def test_a_checkpoint_without_choices_resumes(toy, tmp_path, monkeypatch):
    config = toy.config(max_steps=1)
    whole = persist.boundary

    def without(trainer):
        boundary = whole(trainer)
        return replace(boundary, trainer={k: v for k, v in boundary.trainer.items() if k != "kernel_choices"})

    monkeypatch.setattr(persist, "boundary", without)
    Trainer(config, tmp_path, quiet=True).train()
    resumed = Trainer(config, tmp_path, resume=True, quiet=True)
    assert resumed.state.step == 1
    assert resumed.choices == BUILT_IN
    assert torch.is_tensor(resumed.state.window_loss)
