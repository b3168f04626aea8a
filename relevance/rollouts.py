"""Completions of prompts, sampled or greedy, in batches of like length.

    sample_completions(lm, prompts, num_samples=8, config=SamplingConfig(), seed=0)     [[Completion] * 8] per prompt

Every batch draws from a generator seeded by (seed, batch number), so a batch that is made again after a stop is the same.
Source of the defaults: temperature .99 and top-k 100, DyKnow-RAG arXiv:2510.11122.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis.errors import ConfigError
from relevance.language_model import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 0.99
    """0 takes the most probable token each time."""
    top_k: int = 100
    max_completion_tokens: int = 96
    batch_rows: int = 64

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 1 or self.max_completion_tokens < 1 or self.batch_rows < 1:
            raise ConfigError(
                "sampling: temperature at least 0, top_k, max_completion_tokens and batch_rows at least 1; got "
                f"{self.temperature}, {self.top_k}, {self.max_completion_tokens}, {self.batch_rows}"
            )


GREEDY = SamplingConfig(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer."""

    text: str
    """Without the eos."""
    ids: tuple[int, ...]
    """Sampled tokens, the eos included where it came."""
    terminated: bool
    """Whether an eos came before the length limit."""


def sample_completions(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    config: SamplingConfig = GREEDY,
    seed: int = 0,
    forced: Sequence[str] | None = None,
) -> list[list[Completion]]:
    """Return num_samples completions per prompt, in the order of the prompts.

    Args:
        lm: in eval mode; its device is used.
        prompts: rendered prompts.
        num_samples: completions of each.
        config: temperature, top-k, length limit, rows per batch.
        seed: of the draws.
        forced: the first characters of each answer (a label), which are not sampled; None leaves all to the model.
    """
    starts = forced or [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    per_batch = max(1, config.batch_rows // num_samples)
    found: list[list[Completion]] = [[] for _ in prompts]
    for number, first in enumerate(range(0, len(order), per_batch)):
        rows = order[first : first + per_batch]
        texts = [prompts[row] + starts[row] for row in rows for _ in range(num_samples)]
        sampled = _generate(lm, texts, config, seed=seed * 1_000_003 + number)
        for place, ids in enumerate(sampled):
            row = rows[place // num_samples]
            found[row].append(_completion(lm, starts[row], ids))
    return found


def _completion(lm: LanguageModel, start: str, ids: list[int]) -> Completion:
    ends = [place for place, number in enumerate(ids) if number in lm.eos_ids]
    kept = ids[: ends[0] + 1] if ends else ids
    whole = (*lm.encode(start), *kept) if start else tuple(kept)
    return Completion(text=start + lm.decode(kept), ids=whole, terminated=bool(ends))


@torch.no_grad()
def _generate(lm: LanguageModel, texts: Sequence[str], config: SamplingConfig, *, seed: int) -> list[list[int]]:
    """Return the new token ids of each text, the padding behind the eos included."""
    device = lm.model.device
    batch = lm.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    options: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        options = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": 1.0}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out: Tensor = lm.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=config.max_completion_tokens,
            eos_token_id=list(lm.eos_ids),
            pad_token_id=lm.tokenizer.pad_token_id,
            **options,
        )
    return out[:, batch["input_ids"].shape[1] :].tolist()
