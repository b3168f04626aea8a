"""Run TRL's trainers on a task: SFT, DPO and our GRPO, with logs, checkpoints, time limits and exact resume.

    train_sft(lm, rows, folder, ..) / train_dpo(..) / train_rl(job, rows, folder, ..)  -> folder/final

A stage is a folder: checkpoints, train.jsonl, samples/, and `final` once it is done. A stage that is done is not run again; one
that was stopped goes on from its last whole checkpoint with the same numbers as a straight run (CPU, equal ranks).
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, SFTConfig

from recis.errors import ConfigError, DataError
from relevance.checkpoints import last_complete, mark_complete
from relevance.config import DpoConfig, EngineConfig, RlConfig
from relevance.config import SftConfig as SftSettings
from relevance.files import Preference
from relevance.grader import RolloutJob
from relevance.language_model import LanguageModel
from relevance.ranks import WAIT, from_main, is_main, main_first, num_ranks, on_cpu, wait_for_all
from relevance.run_log import LOG_NAME, append_log, cut_log
from relevance.sft_loss import RelevanceSFTTrainer, TokenWeights
from relevance.tiny import ModelConfig
from relevance.token_head import use_token_head
from relevance.trainer import RelevanceGRPOTrainer

FINAL = "final"
_DPO_WARMUP = 0.05  # of the steps; P


class OutOfTime(Exception):
    """The time limit came first; the stage's last checkpoint is whole, and `--resume` goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop."""

    deadline: float | None = None
    """Of time.monotonic(); None has no end."""

    def is_over(self) -> bool:
        """Return whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check(self, what: str) -> None:
        """Raise OutOfTime when the time is up."""
        if self.is_over():
            raise OutOfTime(f"{what}: time is up; the same command with --resume goes on")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where and how a stage runs."""

    folder: Path
    engine: EngineConfig
    model: ModelConfig
    seed: int
    limits: Limits = field(default_factory=Limits)
    state: Mapping[str, Any] = field(default_factory=dict)
    """Config and data hash, for the checkpoints."""
    say: Callable[[str], None] = print

    @property
    def final(self) -> Path:
        """Folder of the finished model."""
        return self.folder / FINAL

    @property
    def is_done(self) -> bool:
        """Whether the stage has finished."""
        return (self.final / "config.json").exists() or (self.final / "adapter_config.json").exists()


class RunCallback(TrainerCallback):
    """Write the log, stop all ranks at rank 0's time limit, and say how far the run is."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.said = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append what Trainer logs of a step."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            append_log(self.stage.folder / LOG_NAME, {"step": state.global_step, **logs})
            if time.monotonic() - self.said > 20:
                self.said = time.monotonic()
                shown = {name: logs[name] for name in ("loss", "accuracy", "reward") if logs.get(name) is not None}
                numbers = ", ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
                self.stage.say(f"{self.stage.folder.name}: step {state.global_step} of {state.max_steps}: {numbers}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save and stop when the time is up; every step ends a generation window, so a resumed run is the same run."""
        limits = self.stage.limits
        if limits.deadline is not None and from_main(limits.is_over()) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


def train_sft(
    lm: LanguageModel,
    rows: Sequence[tuple[str, str]],
    settings: SftSettings,
    stage: Stage,
    *,
    weights: TokenWeights | None = None,
) -> Path:
    """Train on (prompt, completion) rows and return the folder of the finished model.

    Args:
        lm: the model before.
        rows: completions end without the eos, which is added.
        settings: see its fields.
        stage: where.
        weights: of the tokens; None counts completion tokens alike and prompts not at all.

    Raises:
        DataError: a row is longer than the model's context; nothing is cut silently.
        OutOfTime: the time limit came first.
    """
    if stage.is_done:
        return stage.final
    longest = max((lm.num_tokens(prompt) + lm.num_tokens(text) + 1 for prompt, text in rows), default=0)
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", longest)
    if not rows or longest > limit:
        raise DataError(
            f"{len(rows)} rows, the longest with {longest} tokens; the model reads {limit}",
            option="give rows, lower prompt.max_prompt_tokens, or take a model with a longer context",
        )
    ranks = num_ranks()
    if settings.batch_rows % ranks:
        raise ConfigError(
            f"sft.batch_rows is {settings.batch_rows}, which {ranks} ranks cannot share alike: set a multiple"
        )
    rows_per_rank = settings.batch_rows // ranks
    micro = math.gcd(settings.micro_rows, rows_per_rank)
    args = SFTConfig(
        **_common(stage, settings.learning_rate, settings.warmup_share, settings.max_grad_norm),
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows_per_rank // micro,
        lr_scheduler_type="cosine",
        adam_beta2=0.999,
        max_length=None,
        completion_only_loss=True,
        include_num_input_tokens_seen="non_padding",
    )
    data = Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in rows])
    trainer = RelevanceSFTTrainer(
        model=lm.model,
        args=args,
        train_dataset=data,
        processing_class=lm.tokenizer,
        callbacks=[RunCallback(stage), MarkComplete(stage)],
        peft_config=peft_config(stage.model),
        weights=weights,
    )
    use_token_head(_base(trainer.model))
    return _run(trainer, lm, stage)


def train_dpo(lm: LanguageModel, rows: Sequence[Preference], settings: DpoConfig, stage: Stage) -> Path:
    """Train on preferences against the model as it is on disk, and return the folder of the finished model.

    Raises:
        DataError: no preferences.
        ConfigError: the model is not on disk, so there is nothing to load the reference from.
        OutOfTime: the time limit came first.
    """
    if stage.is_done:
        return stage.final
    if not rows:
        raise DataError(
            "there is no preference pair", option="sample more prompts, or a start that is not always right"
        )
    check_on_disk(lm)
    micro = stage.engine.per_device_rows
    accumulation = max(1, min(stage.engine.accumulation, len(rows) // (micro * num_ranks())))
    num_steps = settings.num_epochs * len(rows) / (micro * num_ranks() * accumulation)
    # a warm-up of less than a step would be one step at rate 0: of a stage of one step nothing would be left
    warmup_share = _DPO_WARMUP if num_steps * _DPO_WARMUP >= 1 else 0.0
    args = DPOConfig(
        **_common(stage, settings.learning_rate, warmup_share, 1.0),
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant_with_warmup",
        beta=settings.beta,
        loss_type=list(settings.loss_types),
        loss_weights=list(settings.loss_weights),
        max_length=None,
    )
    data = Dataset.from_list([{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows])
    trainer = DPOTrainer(
        model=lm.model,
        args=args,
        train_dataset=data,
        processing_class=lm.tokenizer,
        callbacks=[RunCallback(stage), MarkComplete(stage), ChosenDrop(stage)],
        peft_config=peft_config(stage.model),
    )
    return _run(trainer, lm, stage)


def train_rl(
    job: RolloutJob, pair_ids: Sequence[str], settings: RlConfig, stage: Stage, *, kl_scale: float = 1.0
) -> Path:
    """Train by reinforcement and return the folder of the finished model.

    Args:
        job: task, method and model.
        pair_ids: the prompts in the order in which they are trained on, prompts_per_step of them per step.
        settings: see its fields.
        stage: where.
        kl_scale: factor of kl_coef; 1/2 for two prompts, whose loss is half the printed objective.

    Raises:
        ConfigError: rows per step and prompts per step do not fit, or the model is not on disk.
        OutOfTime: the time limit came first.
    """
    if stage.is_done:
        return stage.final
    if settings.kl_coef:
        check_on_disk(job.lm)
    engine = stage.engine
    args = GRPOConfig(
        **_common(stage, settings.learning_rate, settings.warmup_share, settings.max_grad_norm),
        max_steps=settings.max_steps,
        per_device_train_batch_size=engine.per_device_rows,
        gradient_accumulation_steps=engine.accumulation,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        lr_scheduler_type="constant_with_warmup",
        beta=settings.kl_coef * kl_scale,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        loss_type=settings.loss_type,
        use_bias_correction_kl=False,
        num_iterations=settings.num_iterations,
        mask_truncated_completions=False,
        shuffle_dataset=False,
        use_vllm=engine.use_vllm,
        vllm_mode=engine.vllm_mode,
        vllm_gpu_memory_utilization=engine.vllm_memory_share,
    )
    world = args.world_size
    made = engine.per_device_rows * engine.accumulation * world // settings.num_generations
    if made != settings.prompts_per_step:
        raise ConfigError(
            f"rl.prompts_per_step is {settings.prompts_per_step}, but {engine.per_device_rows} rows x {engine.accumulation} "
            f"x {world} ranks / {settings.num_generations} generations make {made}: set it so, or change engine.accumulation"
        )
    task = job.task
    rows = []
    for name in pair_ids:
        pair = task.by_id[name]
        row = {"prompt": task.prompt(pair), "pair_id": name}
        if job.method.has_two_prompts:
            row = {
                "prompt": task.prompt(pair, with_chunk=False),
                "prompt_ctx": task.prompt(pair, with_chunk=True),
                "pair_id": name,
            }
        rows.append(row)
    trainer = RelevanceGRPOTrainer(
        job,
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[RunCallback(stage), SampleFiles(stage)],
        peft_config=peft_config(stage.model),
    )
    return _run(trainer, job.lm, stage)


class MarkComplete(TrainerCallback):
    """Mark checkpoints of trainers that are not ours as whole."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state as the last file, when every rank has written its own."""
        wait_for_all()
        if state.is_world_process_zero:
            mark_complete(self.stage.folder / f"checkpoint-{state.global_step}", self.stage.state)


class ChosenDrop(TrainerCallback):
    """Warn when DPO makes the chosen answers themselves less likely."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.first: float | None = None
        self.has_warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Compare the chosen log-probability with the first one logged."""
        now = (logs or {}).get("logps/chosen")
        if now is None or self.has_warned:
            return
        first = now if self.first is None else self.first
        self.first = first
        if now < first - 0.05 * abs(first):
            self.has_warned = True
            self.stage.say(
                f"dpo: the chosen answers' log-probability fell from {first:.2f} to {now:.2f}; "
                "--set dpo.loss_types=sigmoid,sft --set dpo.loss_weights=1,0.2 holds it"
            )


class SampleFiles(TrainerCallback):
    """Every few steps write completions with their reward parts and step advantages."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.trainer: RelevanceGRPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write eight rows of the last batch."""
        every, trainer = self.stage.engine.sample_every, self.trainer
        if not every or state.global_step % every or not state.is_world_process_zero or trainer is None:
            return
        graded, signal = trainer.last_graded, trainer.last_signal
        if graded is None or signal is None:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "id": graded.pairs[row].id,
                "completion": graded.texts[row],
                "gold": graded.pairs[row].label,
                "guided": bool(graded.is_guided[row]),
                "reward": {name: float(part[row]) for name, part in graded.rewards.parts.items()},
                "advantages": signal.advantages[row].reshape(-1).tolist(),
            }
            for row in range(min(8, len(graded.pairs)))
        ]
        folder = self.stage.folder / "samples"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"step-{state.global_step:06d}.parquet")


def peft_config(model: ModelConfig) -> Any:
    """Return the LoRA config of a model config, None without adapters; the head never gets one."""
    if not model.lora_rank:
        return None
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=model.lora_rank, lora_alpha=2 * model.lora_rank, target_modules=targets, task_type="CAUSAL_LM")


def check_on_disk(lm: LanguageModel) -> None:
    """Refuse a model that is not on disk: TRL loads the reference model from the path in its config, not from memory."""
    name = lm.model.config._name_or_path
    if not name:
        raise ConfigError("the reference model is loaded from disk: save the model and load it by its folder first")


def check_sharded(accelerator: Any) -> None:
    """Refuse FSDP that accelerate leaves out: it reads its FSDP settings on GPUs alone, and trains whole copies elsewhere."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            f"the accelerate config asks for FSDP, but accelerate does not shard on {accelerator.device.type} and would train "
            "whole copies: take relevance/accelerate/two_processes_cpu.yaml, or several GPUs"
        )


def _common(stage: Stage, learning_rate: float, warmup_share: float, max_grad_norm: float) -> dict[str, Any]:
    engine = stage.engine
    return {
        "output_dir": str(stage.folder),
        "learning_rate": learning_rate,
        "warmup_steps": warmup_share,  # below 1 = a share of the steps
        "max_grad_norm": max_grad_norm,
        "bf16": engine.precision == "bf16",
        "gradient_checkpointing": engine.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": engine.save_steps,
        "save_total_limit": engine.keep,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_cpu": on_cpu(),
        "ddp_timeout": int(WAIT.total_seconds()),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": stage.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _run(trainer: Any, lm: LanguageModel, stage: Stage) -> Path:
    """Train to the end, from the last whole checkpoint where there is one, and save the finished model."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SampleFiles):
            callback.trainer = trainer
    _quiet(trainer)
    check_sharded(trainer.accelerator)
    with main_first():
        found = last_complete(stage.folder)
        if is_main():
            cut_log(stage.folder / LOG_NAME, 0 if found is None else trainer_step(found[0]))
    if found is not None and isinstance(trainer, RelevanceGRPOTrainer):
        trainer.restore(found[1])
    trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
    if trainer.state.global_step < trainer.state.max_steps:
        raise OutOfTime(
            f"{stage.folder.name}: time is up at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the same command with --resume goes on"
        )
    part = stage.folder / f"{FINAL}.part"
    trainer.save_model(str(part))  # of all ranks: FSDP and ZeRO gather here
    if trainer.accelerator.is_main_process:
        lm.tokenizer.save_pretrained(part)
        part.rename(stage.final)
    trainer.accelerator.wait_for_everyone()
    return stage.final


def trainer_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.rpartition("-")[2])


def _quiet(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
