"""Grade sampled completions: parse, reward, and the numbers about them that go into the log.

    grader = Grader(job, group_size=8)
    graded = grader.grade(texts, token_ids, pair_ids)
    batch_numbers(graded, advantages)         of one rank: every reward part, accuracy by label and family, faults, violations

Text of any kind gives a number; what has no gold gives NaN, and an infinite reward is refused by the pair's name.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis.errors import ConfigError
from relevance.labels import violations
from relevance.language_model import LanguageModel
from relevance.methods import Graded, Method
from relevance.rewards import Rewards
from relevance.tally import Count, Highest, Mean, Number, Share, mean_of, spread_of
from relevance.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutJob:
    """What a trainer needs beside TRL's own arguments."""

    task: Task
    method: Method
    lm: LanguageModel
    reserve: tuple[str, ...] = ()
    """Ids of the pairs that refill may draw from."""
    has_own_head: bool = True
    """Log-probabilities by our kernel instead of TRL's head."""
    state: Mapping[str, Any] | None = None
    """Config and data hash, written into each checkpoint."""


class Grader:
    """The reward function that a trainer calls; `last` is what it graded."""

    __name__ = "reward"

    def __init__(self, job: RolloutJob, group_size: int) -> None:
        self.job = job
        self.group_size = group_size
        self.last: Graded | None = None
        self.seconds = 0.0

    def __call__(self, *, completions: list[str], completion_ids: list[list[int]], pair_id: list[str], **_: Any) -> Any:
        self.last = self.grade(completions, completion_ids, pair_id)
        return self.last.rewards.total.tolist()

    def grade(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]], pair_ids: Sequence[str], *, is_guided: bool = False
    ) -> Graded:
        """Return rollouts as graded.

        Raises:
            ConfigError: the reward of a row is infinite.
        """
        start = time.perf_counter()
        pairs = tuple(self.job.task.by_id[name] for name in pair_ids)
        eos = set(self.job.lm.eos_ids)
        # a completion of an eos alone is the fault `empty`, one without eos `truncated`
        parsed = tuple(
            self.job.task.read(text, terminated=bool(own) and own[-1] in eos)
            for text, own in zip(texts, ids, strict=True)
        )
        rewards: Rewards = self.job.method.reward(parsed, pairs)
        if bool(rewards.total.isinf().any()):
            worst = pairs[int(rewards.total.isinf().nonzero()[0])].id
            raise ConfigError(f"pair {worst!r}: the reward is infinite; rewards are finite, or NaN for what has none")
        self.seconds += time.perf_counter() - start
        return Graded(
            pairs=pairs,
            texts=tuple(texts),
            ids=tuple(tuple(own) for own in ids),
            parsed=parsed,
            rewards=rewards,
            group_size=self.group_size,
            is_guided=torch.full((len(pairs),), is_guided),
        )


def batch_numbers(graded: Graded, advantages: Tensor) -> dict[str, Number]:
    """Return what is logged about a rank's graded rollouts: every reward part, accuracies, faults, violations, advantages."""
    rewards, count = graded.rewards, len(graded.pairs)
    numbers: dict[str, Number] = {
        "accuracy": mean_of(rewards.correct),
        "unscorable": Count(float(rewards.num_unscorable)),
    }
    for name, part in {"total": rewards.total, **rewards.parts}.items():
        if not bool(part.isnan().all()):
            numbers[f"reward/{name}/mean"] = mean_of(part)
            numbers[f"reward/{name}/std"] = spread_of(part)
    for name, value in (("label", "label"), ("family", "family")):
        found: dict[Any, list[float]] = {}
        for pair, is_right in zip(graded.pairs, rewards.correct.tolist(), strict=True):
            found.setdefault(getattr(pair, value), []).append(float(is_right))
        numbers |= {f"accuracy/{name}={key}": Mean(sum(rights), len(rights)) for key, rights in found.items()}
    faults = Counter(kind for parsed in graded.parsed for kind in {fault.kind for fault in parsed.errors})
    numbers |= {f"fault/{kind}": Share(float(times), count) for kind, times in faults.items()}
    broken = Counter(
        rule for parsed, pair in zip(graded.parsed, graded.pairs, strict=True) for rule in violations(parsed, pair)
    )
    numbers |= {f"violation/{rule}": Share(float(times), count) for rule, times in broken.items()}
    if advantages.ndim == 2:  # per token: what pads a completion is no advantage
        lengths = torch.tensor([len(own) for own in graded.ids])
        advantages = advantages[torch.arange(advantages.shape[1])[None] < lengths[:, None]]
    numbers["advantage/mean"], numbers["advantage/std"] = mean_of(advantages), spread_of(advantages)
    numbers["advantage/max"] = Highest(float(advantages.abs().max()) if advantages.numel() else 0.0)
    return numbers
