"""Rewards of completions: one function per reward, one number per completion, every part logged apart.

    outcome   1[label == gold]                                                                   [B]
    shaped    gate * (w_rel 1[label] + w_cat 1[category] + w_att F1(attributes))                 [B]
    steps     1 or 0 per reasoning step, by a verifier                                           [B, K]

A text of any kind gives a number; a completion with a fault gives 0. NaN = there is nothing to score it by; `advantages.py`
leaves such rows out. Source: outcome, TaoSR1 arXiv:2508.12365 as told by others. `shaped` is after TaoSR-AGRL
arXiv:2510.08048, which states dense rewards over several dimensions and rule adherence: the formula, the weights and the gate
are ours. `steps` is after TaoSR-SHE arXiv:2510.07972, likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recis.errors import ConfigError
from relevance.data import Pair
from relevance.labels import HARD_RULES, AttributeVerdict, Parsed, Profile, violations
from relevance.verify import StepVerifier, attribute_set

NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How completions are rewarded; all numbers are ours."""

    kind: Literal["outcome", "shaped", "steps"] = "outcome"
    require_ok: bool = True
    """A completion with a fault gets 0, whatever its label."""
    w: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Weights of label, category and attributes in the shaped reward."""
    gated: bool = True
    """Multiply by 0 where a hard rule is broken; False is the plain process reward."""
    hard_rules: tuple[str, ...] = HARD_RULES
    """Hard rules that close the gate."""
    ordinal_coef: float = 0.0
    """Share of the label's part that is paid by nearness, 1 - |label - gold| / 3, instead of by being right."""
    allow_reversal: bool = False
    """Accept weights under which a wrong label can outrank a right one; for ablations."""
    max_missing: float = 0.5
    """Largest share of training pairs that may lack the gold that this reward needs."""

    def __post_init__(self) -> None:
        w_rel, w_cat, w_att = self.w
        if min(self.w) < 0 or abs(sum(self.w) - 1) > 1e-9:
            raise ConfigError(f"w must be three weights >= 0 with sum 1; got {self.w}")
        if w_rel <= w_cat + w_att and not self.allow_reversal:
            raise ConfigError(
                f"w {self.w}: a wrong label with perfect steps would outrank a right label; raise the first above the sum "
                "of the others, or set allow_reversal=True"
            )
        unknown = [rule for rule in self.hard_rules if rule not in HARD_RULES]
        if unknown:
            raise ConfigError(f"hard_rules: no such rule {unknown[0]!r}; there are {', '.join(HARD_RULES)}")
        if not 0 <= self.ordinal_coef <= 1 or not 0 <= self.max_missing <= 1:
            raise ConfigError(
                f"ordinal_coef and max_missing lie in [0, 1]; got {self.ordinal_coef}, {self.max_missing}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Rewards of B completions with the parts they are made of."""

    total: Tensor
    """[B] float64; NaN = unscorable."""
    parts: Mapping[str, Tensor]
    """Name -> [B] float64, to be logged apart; NaN = no gold."""
    correct: Tensor
    """[B] bool: the label is right and the text has no fault. What filters, replay and accuracies count, never a reward."""

    @property
    def num_unscorable(self) -> int:
        """How many rows have no reward."""
        return int(self.total.isnan().sum())


def is_correct(parsed: Sequence[Parsed], pairs: Sequence[Pair]) -> Tensor:
    """Return [B] bool: no fault, and the label is the gold one. False without a gold label."""
    return torch.tensor([parse.ok and parse.label == pair.label for parse, pair in zip(parsed, pairs, strict=True)])


def outcome(parsed: Sequence[Parsed], pairs: Sequence[Pair], config: RewardConfig | None = None) -> Rewards:
    """Reward the right label, [B] in [0, 1]; NaN without a gold label."""
    config = config or RewardConfig()
    label = _float([_label_part(parse, pair, config) for parse, pair in zip(parsed, pairs, strict=True)])
    return Rewards(total=label, parts={"label": label}, correct=is_correct(parsed, pairs))


def shaped(parsed: Sequence[Parsed], pairs: Sequence[Pair], config: RewardConfig | None = None) -> Rewards:
    """Reward label, category and attributes behind the gate, [B] in [0, 1]; NaN without a gold label.

    A part without gold is left out and the other weights are scaled to sum 1: with all gold steps hidden this is the
    outcome reward, behind the gate. Parts: label, category, attributes, gate.
    """
    config = config or RewardConfig(kind="shaped")
    columns: dict[str, list[float]] = {"label": [], "category": [], "attributes": [], "gate": []}
    for parse, pair in zip(parsed, pairs, strict=True):
        category, attributes = _step_parts(parse, pair)
        columns["label"].append(_label_part(parse, pair, config))
        columns["category"].append(category)
        columns["attributes"].append(attributes)
        columns["gate"].append(_gate(parse, pair, config))
    parts = {name: _float(column) for name, column in columns.items()}
    total = combine(
        torch.stack([parts["label"], parts["category"], parts["attributes"]], dim=-1), parts["gate"], config.w
    )
    return Rewards(total=total, parts=parts, correct=is_correct(parsed, pairs))


def combine(parts: Tensor, gate: Tensor, w: Sequence[float]) -> Tensor:
    """Return gate * weighted mean of the parts that are known, [B].

    Args:
        parts: [B, D]; the first is the label's, which must be known; NaN elsewhere = no gold, its weight is shared out.
        gate: [B], 0 or 1.
        w: D weights with sum 1.
    """
    weights = torch.as_tensor(w, dtype=parts.dtype, device=parts.device).expand_as(parts)
    weights = weights.masked_fill(parts.isnan(), 0.0)
    total = gate * (weights * parts.nan_to_num(0.0)).sum(-1) / weights.sum(-1)
    return total.masked_fill(parts[..., 0].isnan(), NAN)


def attribute_f1(predicted: Sequence[AttributeVerdict] | None, gold: Mapping[str, str]) -> float:
    """Return F1 over sets of (name, verdict): 2 |hit| / (|predicted| + |gold|), 1 when both are empty, 0 without a block."""
    if predicted is None:
        return 0.0
    said, right = attribute_set(predicted), set(gold.items())
    return 2 * len(said & right) / (len(said) + len(right)) if said or right else 1.0


def step_rewards(parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile, verifier: StepVerifier) -> Tensor:
    """Reward each step, [B, K] in {0, 1, NaN}, K = profile.num_steps.

    Column 0 is the label's: 0 for a completion with a fault, which has one step; its other columns are NaN.

    Raises:
        ValueError: the verifier returned another shape, or a value that is not 0, 1 or NaN.
    """
    rewards = verifier(parsed, pairs, profile)
    if rewards.shape != (len(pairs), profile.num_steps):
        raise ValueError(f"step verdicts must be [{len(pairs)}, {profile.num_steps}]; got {tuple(rewards.shape)}")
    is_legal = rewards.isnan() | (rewards == 0) | (rewards == 1)
    if not bool(is_legal.all()):
        wrong = rewards[~is_legal][0].item()
        raise ValueError(f"a step verdict is 0, 1 or NaN; got {wrong}: threshold the scores of a reward model first")
    has_fault = torch.tensor([not parse.ok for parse in parsed], dtype=torch.bool, device=rewards.device)
    rewards = rewards.masked_fill(has_fault[:, None], NAN)
    is_labelled = torch.tensor([pair.label is not None for pair in pairs], dtype=torch.bool, device=rewards.device)
    first = torch.where(has_fault & is_labelled, torch.zeros_like(rewards[:, 0]), rewards[:, 0])
    return torch.cat([first[:, None], rewards[:, 1:]], dim=1)


def _label_part(parsed: Parsed, pair: Pair, config: RewardConfig) -> float:
    if pair.label is None:
        return NAN
    if parsed.label is None or (config.require_ok and not parsed.ok):
        return 0.0
    near = 1 - abs(parsed.label - pair.label) / 3
    return (1 - config.ordinal_coef) * (parsed.label == pair.label) + config.ordinal_coef * near


def _step_parts(parsed: Parsed, pair: Pair) -> tuple[float, float]:
    """Return the parts of category and attributes."""
    if pair.steps is None:
        return NAN, NAN
    steps, fields = pair.steps, parsed.fields
    category = NAN if steps.category is None else float(fields.category == steps.category)
    attributes = NAN if steps.attributes is None else attribute_f1(fields.attribute, steps.attributes)
    return category, attributes


def _gate(parsed: Parsed, pair: Pair, config: RewardConfig) -> float:
    if config.require_ok and not parsed.ok:
        return 0.0
    if not config.gated:
        return 1.0
    return float(not any(rule in config.hard_rules for rule in violations(parsed, pair)))


def _float(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
