"""The zoo's recipes run through the trainer as they are and learn."""

from dataclasses import replace

import pytest

from recis.checkpoint import list_checkpoints, read_manifest
from recis.errors import ConfigError
from recis.recipes import call_recipe, zoo
from recis.trainer import Trainer


@pytest.mark.parametrize("name", ["dlrm", "deepfm", "dcn", "din", "bst", "mmoe", "ple"])
def test_click_models_learn(name, tmp_path):
    config = call_recipe(f"recis.recipes.zoo:{name}", data=None, out=tmp_path, settings=["num_samples=16384"])
    metrics = Trainer(config, None, quiet=True).train()
    assert 0.64 < metrics["auc" if len(config.tasks) == 1 else "click.auc"] < 0.9
    if len(config.tasks) > 1:
        assert 0.7 < metrics["like.auc"] < 0.95


def test_two_towers_learn(tmp_path):
    config = zoo.two_towers(data=None, out=tmp_path, num_samples=16_384)
    metrics = Trainer(config, None, quiet=True).train()
    assert 0.55 < metrics["gauc"] < 0.9


def test_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'dlrm' makes its own data and cannot read clicks"):
        zoo.dlrm(data="clicks.parquet", out=tmp_path)


@pytest.mark.parametrize(("name", "least"), [("sasrec", 0.5), ("hstu", 0.4), ("seq2seq", 0.2)])
def test_sequence_models_learn(name, least, tmp_path):
    """The next item can be told about 7 times in 10; the most popular one comes about 7 times in 100."""
    config = call_recipe(f"recis.recipes.zoo:{name}", data=None, out=tmp_path, settings=[])
    metrics = Trainer(config, None, quiet=True).train()
    assert least < metrics["hit@1"] < 0.8


@pytest.mark.parametrize("name", ["two_towers", "bst", "sasrec", "hstu", "seq2seq"])
def test_stopped_and_resumed_end_in_the_same_bytes(name, tmp_path):
    """Draws, item frequencies, dropout and metric states go on where the checkpoint left them."""

    def make(folder: str, *, resume: bool = False) -> Trainer:
        config = getattr(zoo, name)(data=None, out=tmp_path, num_samples=12 * 128)
        config = replace(config, train_data=replace(config.train_data, batch_size=128), save_every_steps=4)
        return Trainer(config, tmp_path / folder, resume=resume, quiet=True)

    def files(folder: str) -> dict[str, str]:
        newest = list_checkpoints(tmp_path / folder)[-1]
        return {name: entry.sha256 for name, entry in read_manifest(newest).files.items()}

    make("straight").train()
    stopped = make("stopped")
    step = stopped.train_step

    def step_until_ten(micro_batches):
        if stopped.state.step == 10:
            raise KeyboardInterrupt
        return step(micro_batches)

    stopped.train_step = step_until_ten
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("stopped", resume=True)
    assert resumed.state.step == 8
    resumed.train()
    assert files("stopped") == files("straight")
