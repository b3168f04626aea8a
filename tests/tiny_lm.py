"""A language model of a few thousand weights with its task, and trainers whose completions are given instead of sampled."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from relevance.catalog import CatalogConfig
from relevance.config import EngineConfig
from relevance.grader import RolloutJob
from relevance.language_model import LanguageModel, load_language_model
from relevance.methods import Method
from relevance.oracle import oracle
from relevance.prompts import PromptConfig
from relevance.task import Task, catalog_task
from relevance.tiny import ModelConfig, make_tiny

MODEL = ModelConfig(num_layers=1, hidden_size=64, vocab_size=640)
SMALL = CatalogConfig(num_train=48, num_dev=16, num_test=16)
MICRO = [
    "catalog.num_train=48",
    "catalog.num_dev=16",
    "catalog.num_test=16",
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.vocab_size=640",
    "sft.micro_rows=8",
    "sft.batch_rows=8",
    "sft.num_epochs=1",
    "engine.per_device_rows=8",
    "engine.accumulation=2",
]
MICRO_RL = [*MICRO, "rl.num_generations=4", "rl.prompts_per_step=4", "rl.max_completion_tokens=8", "rl.max_steps=4"]


@cache
def small_task(profile: str = "compact", *, with_chunks: bool = False) -> Task:
    """Return a generated task."""
    config = CatalogConfig(num_train=48, num_dev=16, num_test=16, with_chunks=with_chunks, omit_rate=0.3 * with_chunks)
    return catalog_task(config, profile=profile, prompt=PromptConfig(max_rules=2))


def save_micro(folder: Path, task: Task, *, seed: int = 0) -> Path:
    """Write a fresh model and return its folder."""
    texts = [task.prompt(pair) + oracle(pair, task.profile, with_chunk=task.with_chunk) for pair in task.train]
    return make_tiny(folder, texts, MODEL, rule_ids=task.rule_ids or (), seed=seed)  # type: ignore[arg-type]


def load_micro(folder: Path) -> LanguageModel:
    """Return the model of a folder on the CPU."""
    return load_language_model(folder, device="cpu")


def make_trainer(
    lm: LanguageModel,
    task: Task,
    method: Method,
    out: Path,
    *,
    pair_ids: Sequence[str],
    completions: Callable[[int], str] | None = None,
    kl_scale: float = 1.0,
    reserve: Sequence[str] = (),
    own_head: bool = True,
    rows: int = 8,
    accumulation: int = 1,
    group_size: int = 4,
    **options: Any,
) -> Any:
    """Return a trainer in train mode whose n-th rollout, counted from 0, is completions(n); None samples."""
    from datasets import Dataset
    from trl import GRPOConfig

    from relevance.trainer import RelevanceGRPOTrainer

    settings: dict[str, Any] = {"beta": 0.0, "loss_type": "dapo", "max_completion_length": 16, "learning_rate": 1e-3}
    args = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_generations=group_size,
        use_bias_correction_kl=False,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_steps=100,
        **settings | options,
    )
    by_id = task.by_id
    data = []
    for name in pair_ids:
        row = {"prompt": task.prompt(by_id[name], with_chunk=False), "pair_id": name}
        if method.has_two_prompts:
            row["prompt_ctx"] = task.prompt(by_id[name], with_chunk=True)
        data.append(row)
    job = RolloutJob(task=task, method=method, lm=lm, reserve=tuple(reserve), has_own_head=own_head)
    trainer = RelevanceGRPOTrainer(job, args=args, train_dataset=Dataset.from_list(data))
    if completions is not None:
        give_completions(trainer, lm, completions)
    assert trainer.model is not None
    trainer.model.train()
    trainer.state.max_steps = 100
    trainer.current_gradient_accumulation_steps = accumulation
    return trainer


def give_completions(trainer: Any, lm: LanguageModel, completions: Callable[[int], str]) -> None:
    """Let a trainer "sample" given texts, each closed by the eos."""
    count = 0

    def generate(prompt_ids: Any, *_: Any, **__: Any) -> Any:
        nonlocal count
        rows = []
        for _ in prompt_ids:
            rows.append([*lm.encode(completions(count)), lm.eos_ids[0]])
            count += 1
        return rows, None

    trainer._generate_single_turn = generate


def batch_of(trainer: Any, pair_ids: Sequence[str]) -> dict[str, Any]:
    """Return the generation batch of some prompts, each as often as a group is large."""
    rows = [trainer._row_of(name) for name in pair_ids for _ in range(trainer.grader.group_size)]
    return trainer._generate_and_score_completions(rows)


def engine() -> EngineConfig:
    """Return settings for a few rows."""
    return EngineConfig(per_device_rows=8, accumulation=1, save_steps=2, sample_every=0)
