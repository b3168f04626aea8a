"""Step time of every recipe against TRL's own GRPOTrainer, with the same completions and token positions.

    make bench, or: pytest benchmarks/test_relevance_step.py --benchmark-json=out.json

One model (6 layers, hidden 256, vocabulary as learned), 16 completions of given text per step, prompts of about 150 tokens. A
step is grading, advantages, log-probs, loss and backward; generation is the same call in both and is left out. Peers: plain TRL
with its own head, and ours with TRL's head. The completions are held against TRL's, and the token positions that each model
reads in a step are counted: DyKnow runs the n no-chunk rows again behind the prompt with the chunk. The ratio kept is the raw
one, and positions_over_trl turns it into the ratio per token position that the target of 1.10 means. she takes its advantages
per step in every step here: the curriculum's first stage would take the outcome's. agrl: no group fires.
"""

from typing import Any

import pytest
import torch
from tiny_lm import (  # pyright: ignore[reportMissingImports]  # on pytest's path: tests/tiny_lm.py
    give_completions,
    load_micro,
    make_trainer,
    small_task,
)

from recis.bench.harness import WARM_UP_ROUNDS, compare
from relevance.config import RlConfig
from relevance.language_model import LanguageModel
from relevance.methods import Method, group_signal, outcome_reward, shaped_reward, step_signal, two_group_signal
from relevance.oracle import oracle
from relevance.recipes.she import EVERYTHING
from relevance.replay import ReplayConfig
from relevance.rewards import RewardConfig
from relevance.task import Task
from relevance.tiny import ModelConfig, make_tiny
from relevance.verify import gold_verdicts

ROWS, GROUP = 16, 8
WARM_UP, ROUNDS = 5, 20
POSITIONS_OVER_TRL = {"grpo": 1.0, "agrl": 1.0, "she": 1.0, "dyknow": 1.5}
METHODS = {
    "grpo": lambda task: Method(reward=outcome_reward(), signal=group_signal()),
    "agrl": lambda task: Method(
        reward=shaped_reward(RewardConfig(kind="shaped")), signal=group_signal(), replay=ReplayConfig(tau=-1.0)
    ),
    "she": lambda task: Method(
        reward=outcome_reward(), signal=step_signal(task.profile, gold_verdicts, stages=EVERYTHING)
    ),
    "dyknow": lambda task: Method(reward=outcome_reward(), signal=two_group_signal(), has_two_prompts=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return profile -> (task, folder of a model)."""
    found = {}
    for profile in ("compact", "dyknow"):
        task = small_task(profile, with_chunks=profile == "dyknow")
        texts = [task.prompt(pair) + oracle(pair, task.profile, with_chunk=task.with_chunk) for pair in task.train]
        folder = tmp_path_factory.mktemp(profile)
        make_tiny(folder, texts, ModelConfig(), rule_ids=task.rule_ids)  # type: ignore[arg-type]
        found[profile] = (task, folder)
    return found


def wrong_every_third(task: Task, ids: list[str]) -> Any:
    """Return rollout number -> an oracle's answer, with another label in every third."""

    def text(number: int) -> str:
        pair = task.by_id[ids[(number // GROUP) % len(ids)]]
        good = oracle(pair, task.profile, with_chunk=False)
        return good if number % 3 else f"{int(good[0]) % 4 + 1}{good[1:]}"

    return text


class Step:
    """One training step: score given completions, then forward and backward."""

    def __init__(self, trainer: Any, rows: list[dict[str, Any]]) -> None:
        self.trainer, self.rows = trainer, rows

    def __call__(self) -> dict[str, Any]:
        """Take the step and return its batch."""
        trainer = self.trainer
        batch = trainer._generate_and_score_completions([dict(row) for row in self.rows])
        trainer._compute_loss(trainer.model, batch).backward()
        trainer.model.zero_grad()
        return batch

    def counted(self) -> tuple[dict[str, Any], int]:
        """Take the step and return its batch with the number of token positions that the model read."""
        read = []

        def count(module: Any, args: Any, options: dict[str, Any]) -> None:
            read.append(options["input_ids"].numel())

        hook = self.trainer.model.register_forward_pre_hook(count, with_kwargs=True)
        batch = self()
        hook.remove()
        return batch, sum(read)


def own_step(trainer: Any, ids: list[str]) -> Step:
    """Return a step of ours."""
    return Step(trainer, [trainer._row_of(name) for name in ids for _ in range(GROUP)])


def trl_step(lm: LanguageModel, task: Task, ids: list[str], out: Any) -> Step:
    """Return the same step of `trl.GRPOTrainer`, with its own head, rewards and advantages."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], pair_id: list[str], **_: Any) -> list[float | None]:
        return [
            float(task.read(text).label == task.by_id[name].label)
            for text, name in zip(completions, pair_id, strict=True)
        ]

    args = GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=ROWS, num_generations=GROUP, beta=0.0, bf16=False,
        gradient_checkpointing=False, report_to="none", max_completion_length=96, temperature=RlConfig().temperature,
    )  # fmt: skip
    rows = [{"prompt": task.prompt(task.by_id[name]), "pair_id": name} for name in ids]
    trainer = GRPOTrainer(
        model=lm.model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
    )
    give_completions(trainer, lm, wrong_every_third(task, ids))
    lm.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return Step(trainer, [dict(row) for row in rows for _ in range(GROUP)])


@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark, made, tmp_path, name):
    task, folder = made["dyknow" if name == "dyknow" else "compact"]
    ids = [pair.id for pair in task.train[: ROWS // GROUP]]
    options: dict[str, Any] = {"rows": ROWS, "group_size": GROUP, "loss_type": "grpo" if name == "dyknow" else "dapo"}

    def own(head: bool) -> Any:
        lm = load_micro(folder)
        trainer = make_trainer(
            lm, task, METHODS[name](task), tmp_path, pair_ids=ids, own_head=head,
            completions=wrong_every_third(task, ids), temperature=RlConfig().temperature, **options,
        )  # fmt: skip
        return own_step(trainer, ids)

    impls = {
        "ours": own(True),
        "ours, TRL's head": own(False),
        "trl": trl_step(load_micro(folder), task, ids, tmp_path),
    }
    torch.set_num_threads(2)
    found = {impl: step.counted() for impl, step in impls.items()}
    same = [batch["completion_ids"] for batch, _ in found.values()]
    assert all(torch.equal(ids, same[0]) for ids in same)
    assert (found["ours"][0]["advantages"].ndim == 2) == (name == "she")
    positions = found["ours"][1] / found["trl"][1]
    assert positions == POSITIONS_OVER_TRL[name]  # DyKnow: n more rows beside the 2n
    for _ in range(WARM_UP - WARM_UP_ROUNDS - 1):
        for step in impls.values():
            step()
    compare(
        benchmark,
        case=f"{name} {ROWS} completions",
        ours="ours",
        impls=impls,
        rounds=ROUNDS,
        targets={"trl": 1 / (1.10 * positions)},
        extra={"positions_over_trl": positions},
    )
