"""Bad input of a run, line by line: what the other files of this folder do not have yet.

Unparsable and empty completions, groups of one or with equal rewards, NaN and infinite rewards: test_trl_contract.py. Prompts
over the limit, settings, missing gold: test_catalog.py, test_runs_resume.py. Chat templates: test_serving.py.
"""

import time
from dataclasses import replace

import pytest
import torch
from tiny_lm import MICRO_RL, make_trainer, small_task

from recis.errors import ConfigError, DataError
from relevance.cli import main
from relevance.config import SftConfig
from relevance.engine import train_sft
from relevance.language_model import load_language_model, wrap
from relevance.methods import Method, group_signal, own_reward
from relevance.oracle import oracle
from relevance.recipes import recipe_function
from relevance.reward_calls import RewardError
from relevance.training_run import open_run

pytestmark = pytest.mark.filterwarnings("ignore")


def raises(parsed, pairs):
    raise KeyError("clicks")


def hangs(parsed, pairs):
    time.sleep(30)
    return torch.zeros(len(pairs))


def too_few(parsed, pairs):
    return torch.zeros(1)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (raises, r"reward 'clicks' raised KeyError.*train-0"),
        (hangs, r"reward 'clicks' gave no answer within 0\.1 s on pairs train-0"),
        (too_few, r"reward 'clicks' must return \[4\]"),
    ],
    ids=["raises", "hangs", "wrong shape"],
)
def test_a_reward_that_fails_stops_the_run_before_any_update(function, match, lm, tmp_path):
    task = small_task()
    text = oracle(task.by_id["train-0"], task.profile)
    method = Method(reward=own_reward("clicks", function, timeout_s=0.1), signal=group_signal())
    trainer = make_trainer(lm, task, method, tmp_path, pair_ids=("train-0",), completions=lambda number: text, rows=4)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    with pytest.raises(RewardError, match=match):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_a_tokenizer_that_merges_digits_with_their_neighbours_is_refused(lm, folder, tmp_path, capsys):
    """A real byte-level tokenizer that has learned "\\n4" as one token: the label is no token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    learner = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], show_progress=False)
    core.train_from_iterator(["label:\n4"] * 50, learner)
    merging = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    with pytest.raises(DataError, match="as one token of its own behind the prompt"):
        wrap(lm.model, merging)
    lm.model.save_pretrained(tmp_path / "model")
    merging.save_pretrained(tmp_path / "model")
    arguments = ["train", "grpo", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *(text for setting in MICRO_RL for text in ("--set", setting))]) == 1
    assert "as one token of its own" in capsys.readouterr().err


def test_a_tokenizer_without_an_eos_is_refused(lm):
    lm.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        wrap(lm.model, lm.tokenizer)


def test_a_missing_pad_token_becomes_the_eos(lm):
    lm.tokenizer.pad_token = None
    assert wrap(lm.model, lm.tokenizer).tokenizer.pad_token_id == lm.eos_ids[0]


def test_rows_over_the_context_are_refused_not_cut(lm, tmp_path):
    run = open_run("sft", out=tmp_path / "run", settings=["catalog.num_train=8"], say=lambda line: None)
    lm.model.config.max_position_embeddings = 64
    rows = [("grade this:\n", "4"), ("word " * 80 + "\n", "4")]
    with pytest.raises(DataError, match=r"the longest with \d+ tokens; the model reads 64"):
        train_sft(lm, rows, SftConfig(), run.stage("sft"))
    with pytest.raises(DataError, match="0 rows"):
        train_sft(lm, [], SftConfig(), run.stage("sft"))


def test_a_pair_without_a_chunk_is_asked_plainly_and_left_out_of_the_pool(folder, tmp_path):
    """One missing chunk among many: its prompt is the plain one, byte for byte, and DyKnow trains on the others."""
    task = small_task("dyknow", with_chunks=True)
    place = next(place for place, pair in enumerate(task.train) if pair.family != "plain")
    bare = replace(task.train[place], chunk=None)
    assert task.prompt(bare) == task.prompt(task.train[place], with_chunk=False)
    task = replace(task, train=(*task.train[:place], bare, *task.train[place + 1 :]))
    said = []
    settings = [*MICRO_RL, "rl.max_steps=1", "dyknow.pool.size=100", "dyknow.pool.max_confidence=1"]
    run = open_run("dyknow", out=tmp_path / "run", settings=settings, model=str(folder), task=task, say=said.append)
    recipe_function("dyknow")(run)
    hard = sum(pair.family != "plain" for pair in task.train) - 1
    assert any(f"pool of {hard} prompts" in line for line in said)


def test_a_full_gpu_says_what_to_lower(folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB in all")

    monkeypatch.setattr("relevance.trainer.RelevanceGRPOTrainer.train", full)
    flags = [text for setting in MICRO_RL for text in ("--set", setting)]
    assert main(["train", "grpo", "--model", str(folder), "--out", str(tmp_path / "run"), *flags]) == 1
    said = capsys.readouterr().err
    assert "lower engine.per_device_rows and raise engine.accumulation" in said
    assert "gradient_checkpointing=true" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "final").exists()


def test_no_model_at_the_path(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_language_model(tmp_path / "nothing")
