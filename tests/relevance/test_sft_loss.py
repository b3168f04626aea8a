"""The weighted loss of supervised fine-tuning against full logits, and who gets which weights."""

import json
from typing import Any

import pytest
import torch
from tiny_lm import MICRO, load_micro, save_micro, small_task

from recis.errors import ConfigError
from recis.trainer.override import override
from relevance.config import SftRun
from relevance.oracle import oracle
from relevance.prompts import HEADER, PromptConfig
from relevance.run_log import LOG_NAME, read_log
from relevance.sft_loss import RelevanceSFTTrainer, TokenWeights, label_places, mean_parts
from relevance.token_head import use_token_head
from relevance.training_run import open_run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_label_places_by_hand():
    labels = torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, 5, 6, -100, -100, -100]])
    assert label_places(labels).nonzero().tolist() == [[0, 2], [1, 1]]
    assert label_places(labels, is_label_last=True).nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize(
    "weights",
    [TokenWeights(), TokenWeights(label=10.0), TokenWeights(label=4.0, prompt=0.25), TokenWeights(label=0.0)],
    ids=["plain", "label", "both", "no label"],
)
@pytest.mark.parametrize("items", [None, 100], ids=["batch", "window"])
def test_loss_matches_full_logits(weights, items, tmp_path):
    loss, trainer, rows = _loss(tmp_path, weights, items)
    model: Any = trainer.model
    total, count = torch.tensor(0.0).double(), 0
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        logits = torch.nn.functional.linear(
            model.model(ids).last_hidden_state[0].double(), model.lm_head.weight.double()
        )
        entropy = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        scale = torch.tensor([weights.prompt] * (len(prompt) - 1) + [weights.label] + [1.0] * (len(completion) - 1))
        total, count = total + (entropy * scale).sum(), count + len(completion)
    assert float(loss) == pytest.approx(float(total) / (items or count), rel=1e-5)
    model.zero_grad()
    loss.backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (total / (items or count)).backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def _loss(folder, weights, items):
    """Return the loss of three rows of unequal length, its trainer, and the rows as ids."""
    from datasets import Dataset
    from trl import SFTConfig

    task = small_task()
    lm = load_micro(save_micro(folder / "base", task))
    texts = [(task.prompt(pair), oracle(pair, task.profile)) for pair in (task.train[0], task.train[9], task.train[17])]
    trainer = RelevanceSFTTrainer(
        model=lm.model,
        args=SFTConfig(output_dir=str(folder / "out"), completion_only_loss=True, report_to="none", bf16=False),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in texts]),
        processing_class=lm.tokenizer,
        weights=weights,
    )
    use_token_head(trainer.model)
    assert trainer.model is not None
    trainer.model.eval()
    data: Any = trainer.train_dataset
    inputs = trainer.data_collator([data[row] for row in range(3)])
    loss = trainer.compute_loss(
        trainer.model, inputs, num_items_in_batch=None if items is None else torch.tensor(items)
    )
    return loss, trainer, [(lm.encode(prompt), [*lm.encode(text), lm.eos_ids[0]]) for prompt, text in texts]


def test_parts_of_the_log():
    assert mean_parts([4.0, 6.0, 9.0], [2.0, 3.0, 3.0], has_prompt=True) == {
        "cross_entropy/label": 2.0,
        "cross_entropy/rationale": 2.0,
        "cross_entropy/prompt": 3.0,
    }
    assert mean_parts([4.0, 0.0, 9.0], [2.0, 0.0, 3.0], has_prompt=False) == {"cross_entropy/label": 2.0}


class TestWeightsOfARun:
    def run(self, tmp_path, name, *, model=None, settings=()):
        out = tmp_path / name
        run = open_run("sft", out=out, settings=[*MICRO, *settings], model=model, say=lambda line: None)
        run.train_sft()
        return read_log(out / "sft" / LOG_NAME)

    def test_a_fresh_model_reads_prompts_a_given_one_answers_alone(self, tmp_path):
        fresh = self.run(tmp_path, "fresh")
        assert all("cross_entropy/prompt" in entry for entry in fresh)
        run = open_run("sft", out=tmp_path / "fresh", resume=True, say=lambda line: None)
        lm = run.load(run.train_sft())
        rows = run.sft_rows(run.task_of(lm))
        assert fresh[-1]["num_tokens"] == sum(lm.num_tokens(p) + lm.num_tokens(text) + 1 for p, text in rows)
        model = str(tmp_path / "fresh" / "sft" / "final")
        given = self.run(tmp_path, "given", model=model)
        assert not any("cross_entropy/prompt" in entry for entry in given)
        own = self.run(tmp_path, "own", model=model, settings=["sft.prompt_weight=0.5", "sft.label_weight=2"])
        assert own[0]["cross_entropy/label"] == pytest.approx(given[0]["cross_entropy/label"], rel=1e-4)
        assert own[0]["loss"] > given[0]["loss"]  # the same rows with more weight

    def test_bad_weights_are_named(self):
        for name in ("label_weight", "prompt_weight"):
            for value in ("-1", "nan", "inf"):
                with pytest.raises(ConfigError, match=rf"sft\.{name} must be a finite number"):
                    override(SftRun(), [f"sft.{name}={value}"])


def test_prompts_without_the_header(tmp_path):
    """A model that was trained without the header is asked without it."""
    settings = [*MICRO, "prompt.has_header=false", "prompt.max_rules=0"]
    run = open_run("sft", out=tmp_path / "run", settings=settings, say=lambda line: None)
    pair = run.task.train[0]
    assert run.task.prompt(pair).startswith(f"query: {pair.query}\n")
    assert small_task().prompt(pair).startswith(HEADER)
    final = run.finish(run.train_sft())
    stored = json.loads((final / "grader.json").read_text())["prompt"]
    assert PromptConfig(**stored) == run.config.prompt
