"""Who says whether a reasoning step is right: gold or human verdicts first, other verifiers where those are missing.

    step rewards [B, K] in {0, 1, NaN}      step 0 = label, step k = k-th block of the profile; NaN = nobody knows

`first_of` asks the verifiers in order; an earlier one always overrides. A verifier that is checked on held-out steps and
found weak is switched off per step type. Source: a hybrid of human-annotated offline verifier and generative stepwise reward
model, TaoSR-SHE arXiv:2510.07972; order, thresholds and the check are ours.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.errors import ConfigError, nearest
from relevance.data import Pair, StepGold
from relevance.labels import AttributeVerdict, Parsed, Profile

StepVerifier = Callable[[Sequence[Parsed], Sequence[Pair], Profile], Tensor]
"""(parsed, pairs, profile) -> verdicts [B, K] in {0, 1, NaN}; rows whose text is faulty are NaN from column 1 on."""
TOO_WEAK = 0.8


def gold_verdicts(parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> Tensor:
    """Verify steps against the gold steps of the pairs, [B, K].

    Label and verdict steps are right when they are the pair's label; category, rule and attribute steps when they equal
    the gold ones (attributes as sets of name and verdict). The blocks query, item, why and context have no gold: NaN.
    """
    return torch.tensor(
        [_row(parse, pair, pair.steps, profile) for parse, pair in zip(parsed, pairs, strict=True)], dtype=torch.float64
    ).view(len(pairs), profile.num_steps)


def _row(parsed: Parsed, pair: Pair, steps: StepGold | None, profile: Profile) -> list[float]:
    nan = float("nan")
    label = nan if pair.label is None else float(parsed.ok and parsed.label == pair.label)
    row = [label]
    for tag in profile.tags:
        right: bool | None = None
        if not parsed.ok:
            pass
        elif tag == "verdict" and pair.label is not None:
            right = parsed.fields.verdict == pair.label
        elif tag == "category" and steps is not None and steps.category is not None:
            right = parsed.fields.category == steps.category
        elif tag == "rule" and steps is not None and steps.rule is not None:
            right = parsed.fields.rule == steps.rule
        elif tag == "attribute" and steps is not None and steps.attributes is not None:
            right = attribute_set(parsed.fields.attribute) == set(steps.attributes.items())
        row.append(nan if right is None else float(right))
    return row


def attribute_set(verdicts: Sequence[AttributeVerdict] | None) -> set[tuple[str, str]]:
    """Return the set of (name, verdict) of an attribute block."""
    return {(entry.name, entry.verdict) for entry in verdicts or ()}


def noisy_oracle(truth: Mapping[str, StepGold], *, accuracy: float = 0.9, seed: int = 0) -> StepVerifier:
    """Return a stand-in for a trained stepwise reward model: true verdicts, of which a share is flipped.

    Whether a verdict is flipped is a function of seed, pair, step and what the step says, so the same answer always gets
    the same verdict. Label and verdict steps are left to the gold label.

    Args:
        truth: pair id -> steps, also of pairs whose gold is hidden from training (`Catalog.hidden_steps`).
        accuracy: share of verdicts that are not flipped, in [0, 1].
        seed: of the flips.
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy must lie in [0, 1]; got {accuracy}")

    def verify(parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> Tensor:
        rows = []
        for parse, pair in zip(parsed, pairs, strict=True):
            row = _row(parse, pair, truth.get(pair.id), profile)
            for column, tag in enumerate(profile.steps):
                if tag in ("label", "verdict"):
                    row[column] = float("nan")
                elif _draw(f"{seed}|{pair.id}|{tag}|{getattr(parse.fields, tag)}") >= accuracy:
                    row[column] = 1.0 - row[column]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float64).view(len(pairs), profile.num_steps)

    return verify


def _draw(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56


def thresholded(scores: Callable[..., Tensor], *, threshold: float = 0.5) -> StepVerifier:
    """Return the verdicts of a reward model that gives P(step is right) in [B, K]; NaN stays NaN."""

    def verify(parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> Tensor:
        return binary_verdicts(scores(parsed, pairs, profile), threshold=threshold)

    return verify


def binary_verdicts(scores: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Return 1 where a score is at least the threshold, 0 below it, NaN where it is NaN."""
    return torch.where(scores.isnan(), scores, (scores >= threshold).to(scores.dtype))


def override(verdicts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge verdicts [B, K] of several sources; an earlier source overrides a later one.

    Returns:
        (merged [B, K], source [B, K] int64: which source spoke, -1 = none).

    Raises:
        ValueError: no source, or shapes differ.
    """
    if not verdicts or any(source.shape != verdicts[0].shape for source in verdicts):
        raise ValueError(f"sources must have one shape [B, K]; got {[tuple(source.shape) for source in verdicts]}")
    merged = torch.full_like(verdicts[0], float("nan"))
    spoke = torch.full(merged.shape, -1, dtype=torch.int64, device=merged.device)
    for number, source in enumerate(verdicts):
        is_new = (spoke < 0) & ~source.isnan()
        merged = torch.where(is_new, source.to(merged.dtype), merged)
        spoke = torch.where(is_new, number, spoke)
    return merged, spoke


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """Several verifiers by name, asked in order, some switched off for some step types."""

    verifiers: Mapping[str, StepVerifier]
    """Name -> verifier, the most trusted first: "gold", then "ebrm", then "rm"."""
    switched_off: frozenset[tuple[str, str]] = frozenset()
    """(verifier, step type) that `weak_steps` found too weak."""

    def __post_init__(self) -> None:
        if not self.verifiers:
            raise ConfigError("a hybrid needs at least one verifier")
        for name, _ in self.switched_off:
            if name not in self.verifiers:
                raise ConfigError(f"switched_off names verifier {name!r}; {nearest(name, self.verifiers)}")

    def __call__(self, parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> Tensor:
        """Return the verdicts [B, K]."""
        return self.with_sources(parsed, pairs, profile)[0]

    def with_sources(self, parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> tuple[Tensor, Tensor]:
        """Return the verdicts and which verifier gave each, [B, K] int64 into `verifiers`, -1 = none (for the log)."""
        tables = []
        for name, verifier in self.verifiers.items():
            verdicts = verifier(parsed, pairs, profile)
            off = [column for column, step in enumerate(profile.steps) if (name, step) in self.switched_off]
            if off:
                verdicts = verdicts.index_fill(1, torch.tensor(off, device=verdicts.device), float("nan"))
            tables.append(verdicts)
        return override(tables)


def weak_steps(
    name: str, verdicts: Tensor, truth: Tensor, profile: Profile, *, min_balanced_accuracy: float = TOO_WEAK
) -> dict[str, float]:
    """Return the step types on which a verifier is too weak, with its balanced accuracy there, and warn of each.

    Args:
        name: of the verifier, for the warning.
        verdicts: [N, K] of the verifier on held-out steps: 1,000 of them, or all if there are fewer.
        truth: [N, K] gold verdicts; NaN in either leaves a step out.
        profile: names the K step types.
        min_balanced_accuracy: below it a step type is switched off (ours: .8).

    Balanced accuracy = mean of the two classes' recalls; of the one recall where only one class was checked. A type without
    any checked step counts as weak: nothing speaks for the verifier there; but where it gave no verdict there is nothing to
    switch off.
    """
    weak = {}
    for column, step in enumerate(profile.steps):
        said, right = verdicts[:, column], truth[:, column]
        if bool(said.isnan().all()):
            continue
        accuracy = balanced_accuracy(said, right)
        if not accuracy >= min_balanced_accuracy:
            weak[step] = accuracy
            warnings.warn(
                f"verifier {name!r} is switched off for step {step!r}: balanced accuracy {accuracy:.3f} on held-out steps, "
                f"below {min_balanced_accuracy}",
                stacklevel=2,
            )
    return weak


def balanced_accuracy(verdicts: Tensor, truth: Tensor) -> float:
    """Return the mean recall of the classes that occur among the checked steps [N]; NaN when none was checked."""
    is_checked = ~(verdicts.isnan() | truth.isnan())
    said, right = verdicts[is_checked].numpy(force=True) > 0.5, truth[is_checked].numpy(force=True) > 0.5
    recalls = [np.mean(said[right == value] == value) for value in (False, True) if np.any(right == value)]
    return float(np.mean(recalls)) if recalls else float("nan")
