"""Offline preference pairs for DPO from N samples per prompt.

    some right     chosen = own right, rejected = own wrong
    none right     chosen = the oracle's rationale, rejected = own wrong
    all right      no pair

Source: TaoSR1 arXiv:2508.12365 as told by others; the limits per prompt, on oracle pairs and on the label histogram, and the
deduplication are ours.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recis.errors import DataError
from relevance.data import Pair
from relevance.files import Preference, Sample
from relevance.labels import Parsed, Profile

SCARCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig:
    """Limits of the preference pairs; all numbers are ours."""

    max_pairs_per_prompt: int = 2
    max_oracle_share: float = 0.2
    """Largest share of pairs whose chosen side is the oracle's; the rest of them is dropped at random."""
    max_label_ratio: float = 2.0
    """Largest ratio between the most and the least frequent label of the chosen sides; a label that is too scarce to level the
    others to (see `_limit_labels`) does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSet:
    """Preference pairs, and what was left out on the way."""

    rows: tuple[Preference, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """all_right, no_oracle, duplicates, over_prompt_limit, dropped_oracle, dropped_label, scarce_labels; pairs by source."""


Reader = Callable[[str], Parsed]
"""Completion -> parsed, with the run's profile and rule base."""


def make_preferences(
    pairs: Sequence[Pair],
    samples: Mapping[str, Sequence[Sample]],
    prompts: Mapping[str, str],
    oracles: Mapping[str, str],
    read: Reader,
    *,
    config: PreferenceConfig | None = None,
    seed: int = 0,
) -> PreferenceSet:
    """Return the preference pairs of labelled pairs.

    Args:
        pairs: with gold labels.
        samples: pair id -> its samples.
        prompts: pair id -> prompt.
        oracles: pair id -> rationale of the oracle; a pair without one gives no oracle pair (counted).
        read: parses a completion; a sample is right when it has no fault and the gold label. The label is always taken out
            of the text again, never from the sample's column.
        config: limits.
        seed: of what is dropped.
    """
    config = config or PreferenceConfig()
    rng = np.random.Generator(np.random.Philox(seed))
    counts: Counter[str] = Counter()
    rows: list[tuple[Preference, int]] = []
    for pair in pairs:
        found = _of_prompt(pair, samples.get(pair.id, ()), prompts[pair.id], oracles.get(pair.id), read, counts)
        counts["over_prompt_limit"] += max(0, len(found) - config.max_pairs_per_prompt)
        rows.extend(found[: config.max_pairs_per_prompt])
    rows = _limit_labels(rows, config.max_label_ratio, rng, counts)
    rows = _limit_oracle(rows, config.max_oracle_share, rng, counts)
    rows = _limit_labels(rows, config.max_label_ratio, rng, counts)
    for row, _ in rows:
        counts[row.source] += 1
    return PreferenceSet(rows=tuple(row for row, _ in rows), counts=dict(counts))


def check_preference(row: Preference, read: Reader) -> tuple[Parsed, Parsed]:
    """Return both sides as parsed.

    Raises:
        DataError: equal texts, a chosen side with a fault, or equal labels.
    """
    chosen, rejected = read(row.chosen), read(row.rejected)
    unit = f"preference of pair {row.id!r}"
    if normalised(row.chosen) == normalised(row.rejected):
        raise DataError("chosen and rejected are the same text", unit=unit, value=row.chosen)
    if not chosen.ok:
        raise DataError(f"the chosen side has a fault: {chosen.errors[0].kind}", unit=unit, value=row.chosen)
    if chosen.label == rejected.label:
        raise DataError(f"chosen and rejected have the same label {chosen.label}", unit=unit, value=row.rejected)
    return chosen, rejected


def check_completion(completion: str, profile: Profile, read: Reader) -> Parsed:
    """Return a rationale that SFT is to learn as parsed.

    Raises:
        DataError: it has a fault; the first is named with its place.
    """
    parsed = read(completion)
    if not parsed.ok:
        fault = parsed.errors[0]
        raise DataError(f"no {profile.name} rationale: {fault.kind} at character {fault.at}", value=completion)
    return parsed


def normalised(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


def _of_prompt(
    pair: Pair,
    samples: Sequence[Sample],
    prompt: str,
    oracle: str | None,
    read: Reader,
    counts: Counter[str],
) -> list[tuple[Preference, int]]:
    """Return the (preference, chosen label) of one prompt, each right sample and each wrong one used once."""
    if pair.label is None:
        raise DataError("a preference needs the gold label", unit=f"pair {pair.id!r}")
    distinct: dict[tuple[int | None, str], tuple[str, bool]] = {}
    for sample in samples:
        parsed = read(sample.completion)
        key = (parsed.label, normalised(sample.completion))
        counts["duplicates"] += key in distinct
        is_right = parsed.ok and parsed.label == pair.label
        if key not in distinct or (is_right and not distinct[key][1]):  # blanks can be a fault: the clean twin is kept
            distinct[key] = (sample.completion, is_right)
    right = [text for text, is_right in distinct.values() if is_right]
    # an answer with the right label and a fault is neither side: both labels would be equal
    wrong = [text for (label, _), (text, _) in distinct.items() if label != pair.label]
    if not wrong:
        counts["all_right"] += bool(right)
        return []
    source = "own"
    if not right:
        if oracle is None:
            counts["no_oracle"] += 1
            return []
        right, source = [oracle] * len(wrong), "oracle"
    found = []
    for chosen, rejected in zip(right, wrong, strict=False):
        row = Preference(id=pair.id, prompt=prompt, chosen=chosen, rejected=rejected, source=source)
        check_preference(row, read)
        found.append((row, pair.label))
    return found


def _limit_oracle(
    rows: list[tuple[Preference, int]], max_share: float, rng: np.random.Generator, counts: Counter[str]
) -> list[tuple[Preference, int]]:
    oracle = [number for number, (row, _) in enumerate(rows) if row.source == "oracle"]
    num_own = len(rows) - len(oracle)
    allowed = len(oracle) if max_share >= 1 else int(max_share * num_own / (1 - max_share) + 1e-9)
    dropped = set(rng.permutation(oracle)[: max(0, len(oracle) - allowed)].tolist())
    counts["dropped_oracle"] += len(dropped)
    return [row for number, row in enumerate(rows) if number not in dropped]


def _limit_labels(
    rows: list[tuple[Preference, int]], max_ratio: float, rng: np.random.Generator, counts: Counter[str]
) -> list[tuple[Preference, int]]:
    """Drop pairs at random until no label of the chosen sides is max_ratio times as frequent as another.

    A model that hardly errs on a label leaves next to no pair of it, and levelling to that takes nearly all others away (298
    of 305 in a run of the ladder). So a label with less than SCARCE of an even share sets no limit; such labels are counted.
    """
    histogram = Counter(label for _, label in rows)
    if not histogram:
        return rows
    even = len(rows) / len(histogram)
    levels = [count for count in histogram.values() if count >= SCARCE * even]
    counts["scarce_labels"] = len(histogram) - len(levels)
    allowed = int(max_ratio * min(levels) + 1e-9)
    order = rng.permutation(len(rows))
    taken: Counter[int] = Counter()
    kept = set()
    for number in order:
        label = rows[number][1]
        if taken[label] < allowed:
            taken[label] += 1
            kept.add(int(number))
    counts["dropped_label"] += len(rows) - len(kept)
    return [row for number, row in enumerate(rows) if number in kept]
