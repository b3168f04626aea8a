"""How good answers about products are.

    ROUGE-L     F1 of the longest common subsequence of words: 2 P R / (P + R), P = lcs / words said, R = lcs / words wanted
    accuracy    answers equal after normalisation
    micro-F1    (attribute, value) pairs over all products: 2 hits / (said + wanted), values normalised
    rejection   of `unknown`: F1 of saying it where it is right

Source of ROUGE-L: Lin 2004; here with beta = 1 and words as the tokens.
"""

from collections import Counter
from collections.abc import Sequence

from recis.ebrm.canonical import canonical_text
from recis.recipes.product_tasks import UNKNOWN, Sample, read_attributes


def rouge_l(said: str, wanted: str) -> float:
    """Return ROUGE-L of two texts in [0, 1]; 1 where both are empty."""
    left, right = canonical_text(said).split(), canonical_text(wanted).split()
    if not left and not right:
        return 1.0
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for at, other in enumerate(right, start=1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(left) + len(right))


def f1(hits: int, said: int, wanted: int) -> float:
    """Return 2 hits / (said + wanted); 1 where nothing was said and nothing wanted."""
    return 2 * hits / (said + wanted) if said + wanted else 1.0


def attribute_counts(sample: Sample, said: str) -> tuple[int, int, int]:
    """Return (hits, said, wanted) of an extraction's pairs, each counted once, values normalised."""
    wanted = {(name, sample.record.normalised(value)) for name, value in read_attributes(sample.answer)}
    found = {(name, sample.record.normalised(value)) for name, value in read_attributes(said)}
    return len(found & wanted), len(found), len(wanted)


def is_right(sample: Sample, said: str) -> bool:
    """Return whether an answer says what was wanted; of several values any order will do."""
    wanted, found = (
        Counter(sample.record.normalised(part) for part in text.split(" or ")) for text in (sample.answer, said)
    )
    return wanted == found


def measure(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, float]:
    """Return the metrics of each task that occurs, `<task>.<metric>`; question also has its rejection F1."""
    metrics: dict[str, float] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        own = [(sample, said) for sample, said in zip(samples, answers, strict=True) if sample.task == task]
        if task in ("caption", "complete", "correct"):
            metrics[f"{task}.rouge_l"] = sum(rouge_l(said, sample.answer) for sample, said in own) / len(own)
        elif task == "extract":
            hits, said, wanted = map(sum, zip(*(attribute_counts(*pair) for pair in own), strict=True))
            metrics["extract.micro_f1"] = f1(hits, said, wanted)
        else:
            metrics[f"{task}.accuracy"] = sum(is_right(*pair) for pair in own) / len(own)
        if task == "question":
            refused = [canonical_text(said) == UNKNOWN for _, said in own]
            wanted_refusals = [sample.answer == UNKNOWN for sample, _ in own]
            hits = sum(a and b for a, b in zip(refused, wanted_refusals, strict=True))
            metrics["question.rejection_f1"] = f1(hits, sum(refused), sum(wanted_refusals))
    return metrics
