"""EBRM's verdicts as step verdicts, as uncertainty of the pool, and as words where no rationale is generated.

    verifier = EbrmVerifier(model, items)             items: item id -> recis.ebrm Item
    verifier(parsed, pairs, profile)                  [B, K] in {0, 1, NaN}: a StepVerifier
    verifier.disagreement(pairs, probs)               |p - P(label 4)| [N]
    agreement(verifier, pairs)                        how often it says what the gold steps say

An answer's category step is right when it says what EBRM says; its attribute step when it does for every type that EBRM finds
constrained. Answers about other constraints, items that EBRM only estimates (approximate) and all other steps get NaN. Types
are matched to constraint names by name. Source: EBRM, see `recis.ebrm.explanation`; the mapping is ours.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recis.errors import ConfigError, DataError
from relevance.catalog import to_ebrm
from relevance.data import FAMILIES, Pair
from relevance.labels import Parsed, Profile

if TYPE_CHECKING:
    from recis.ebrm.entities import Item as EbrmItem
    from recis.ebrm.explanation import Explanation, Verdicts
    from recis.ebrm.model import EBRM

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class EbrmVerifier:
    """Verify steps by a trained EBRM."""

    model: "EBRM"
    items: Mapping[str, "EbrmItem"]
    """Item id -> its entities; pairs of other items get NaN."""
    _explained: dict[tuple[str, str], "Explanation"] = field(default_factory=dict, repr=False)

    def __call__(self, parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> Tensor:
        """Return the verdicts [B, K]; see `verify.StepVerifier`."""
        rows = [self._row(parse, pair, profile) for parse, pair in zip(parsed, pairs, strict=True)]
        return torch.tensor(rows, dtype=torch.float64).view(len(pairs), profile.num_steps)

    def explain(self, pair: Pair) -> "Explanation | None":
        """Return EBRM's explanation of a pair; None for an item that it does not know."""
        from recis.ebrm.explanation import explain

        item = self.items.get(pair.item_id)
        if item is None:
            return None
        key = (pair.query, pair.item_id)
        if key not in self._explained:
            self._explained[key] = explain(self.model, pair.query, item)
        return self._explained[key]

    def verdicts(self, pair: Pair) -> "Verdicts | None":
        """Return EBRM's verdicts; None where it does not know the item or only estimates."""
        from recis.ebrm.explanation import verdicts

        explanation = self.explain(pair)
        return None if explanation is None or explanation.is_approximate else verdicts(explanation)

    def why(self, pair: Pair) -> str:
        """Return EBRM's reasons in words, for a score without a rationale; "" where it has none."""
        said = self.verdicts(pair)
        if said is None:
            return ""
        parts = [] if said.category is None else [f"category {said.category}"]
        return ", ".join([*parts, *(f"{name} {verdict}" for name, verdict in said.attributes.items())])

    def disagreement(self, pairs: Sequence[Pair], probs: Tensor) -> Tensor:
        """Return |p - P(label 4)| [N] float64, 0 where EBRM does not know the item; probs [N, 4], label 1 first.

        Raises:
            NotCalibratedError: the model's calibrator was not fitted.
        """
        gaps = []
        for pair, row in zip(pairs, probs.double(), strict=True):
            explanation = self.explain(pair)
            gaps.append(0.0 if explanation is None else abs(explanation.p - float(row[3])))
        return torch.tensor(gaps, dtype=torch.float64)

    def _row(self, parsed: Parsed, pair: Pair, profile: Profile) -> list[float]:
        row = [NAN] * profile.num_steps
        said = self.verdicts(pair) if parsed.ok else None
        if said is None:
            return row
        for column, tag in enumerate(profile.steps):
            if tag == "category" and said.category is not None:
                row[column] = float(parsed.fields.category == said.category)
            elif tag == "attribute" and parsed.fields.attribute is not None:
                own = {entry.name: entry.verdict for entry in parsed.fields.attribute}
                known = {name: verdict for name, verdict in said.attributes.items() if name in self._comparable}
                if own.keys() <= self._comparable:
                    row[column] = float(own == known)
        return row

    @property
    def _comparable(self) -> frozenset[str]:
        """Constraint names that are types of the schema."""
        return frozenset(self.model.config.schema.names)


def agreement(verifier: EbrmVerifier, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return how often EBRM's verdicts are the gold ones, over the pairs with gold steps that it knows.

    category: share of pairs. attribute: share of gold (constraint, verdict) of the schema's types that EBRM gives too.
    constraints: share of EBRM's constrained types that are gold constraints. Each with its count; NaN without any.
    balanced_category, balanced_attribute: the mean of those shares over the gold verdicts that occur; a constant verdict gets
    one over their number.
    """
    counts = dict.fromkeys(("category", "attribute", "constraints"), 0)
    right = dict.fromkeys(counts, 0)
    told: dict[str, dict[str, list[bool]]] = {"category": {}, "attribute": {}}
    names = frozenset(verifier.model.config.schema.names)
    for pair in pairs:
        said = None if pair.steps is None else verifier.verdicts(pair)
        if said is None or pair.steps is None:
            continue
        if pair.steps.category is not None and said.category is not None:
            counts["category"] += 1
            right["category"] += said.category == pair.steps.category
            told["category"].setdefault(pair.steps.category, []).append(said.category == pair.steps.category)
        gold = {name: verdict for name, verdict in (pair.steps.attributes or {}).items() if name in names}
        counts["attribute"] += len(gold)
        right["attribute"] += sum(said.attributes.get(name) == verdict for name, verdict in gold.items())
        for name, verdict in gold.items():
            told["attribute"].setdefault(verdict, []).append(said.attributes.get(name) == verdict)
        counts["constraints"] += len(said.attributes)
        right["constraints"] += sum(name in gold for name in said.attributes)
    shares = {name: right[name] / counts[name] if counts[name] else NAN for name in counts}
    balanced = {
        f"balanced_{name}": float(np.mean([np.mean(own) for own in of_verdict.values()])) if of_verdict else NAN
        for name, of_verdict in told.items()
    }
    return shares | balanced | {f"num_{name}": float(count) for name, count in counts.items()}


def fit_cuts(verifier: EbrmVerifier, pairs: Sequence[Pair]) -> EbrmVerifier:
    """Return the verifier with cuts of its verdicts that are fitted on gold steps, of pairs that nothing is measured on.

    A model that was trained on labels alone has the cuts of an unfitted one, which may call no type constrained at all. The
    model is changed in memory, not in its folder. Each cut: see `recis.ebrm.calibrate.fit_verdict_thresholds`; where no gold
    category is near, as on PriceRunner, near is never said.
    """
    from recis.ebrm.calibrate import fit_verdict_thresholds

    columns: dict[str, list[float]] = {
        name: [] for name in ("g", "met", "category_g", "category_met", "s_none", "is_free")
    }
    for pair in pairs:
        explanation = verifier.explain(pair)
        if pair.steps is None or pair.steps.attributes is None or explanation is None or explanation.is_approximate:
            continue
        for truth in explanation.types:
            if truth.type == explanation.category_type:
                columns["category_g"].append(truth.g)
                columns["category_met"].append(pair.steps.category == "match")
                continue
            said = pair.steps.attributes.get(truth.type)
            columns["s_none"].append(truth.s_none)
            columns["is_free"].append(said is None)
            if said is not None and truth.has_value:
                columns["g"].append(truth.g)
                columns["met"].append(said == "ok")
    cuts = fit_verdict_thresholds(**{name: np.array(own) for name, own in columns.items()})
    if not any(pair.steps is not None and pair.steps.category == "near" for pair in pairs):
        cuts = replace(cuts, near=cuts.match)
    verifier.model.thresholds = cuts
    return EbrmVerifier(model=verifier.model, items=verifier.items)  # what was explained has the old cuts


def agreement_report(folder: str | Path, pairs: Sequence[Pair], *, fit_on: Sequence[Pair] = ()) -> dict[str, Any]:
    """Return the agreement of a trained EBRM with the gold steps of pairs: "all", and by family.

    Also "judged", the share of pairs with gold steps on which it gives verdicts at all, and "always_match" and "always_ok",
    what constant verdicts would get right of categories and attributes.

    Args:
        folder: of `recis ebrm train`.
        pairs: with gold steps; others are left out.
        fit_on: pairs of other queries whose gold steps the cuts are fitted on; none keeps the model's own.

    Raises:
        ConfigError: see `load_verifier`.
        DataError: no pair has gold steps.
    """
    known = [pair for pair in pairs if pair.steps is not None]
    if not known:
        raise DataError("no pair has gold steps", column="steps", option="give pairs with steps, or another part")
    verifier = load_verifier(folder, [*known, *fit_on])
    verifier = fit_cuts(verifier, fit_on) if fit_on else verifier
    slices = {"all": known} | {name: [pair for pair in known if pair.family == name] for name in FAMILIES}
    found = {}
    for name, part in slices.items():
        if part:
            judged = sum(verifier.verdicts(pair) is not None for pair in part)
            names = verifier.model.config.schema.names
            steps = [pair.steps for pair in part if pair.steps is not None]
            given = [said for own in steps for name, said in (own.attributes or {}).items() if name in names]
            found[name] = {
                **agreement(verifier, part),
                "judged": judged / len(part),
                "always_match": sum(own.category == "match" for own in steps) / len(steps),
                "always_ok": given.count("ok") / len(given) if given else NAN,
            }
    cuts = verifier.model.thresholds.to_json()
    return {"model": verifier.model.version, "num_pairs": len(known), "thresholds": cuts, "slices": found}


def load_verifier(folder: str | Path, pairs: Sequence[Pair]) -> EbrmVerifier:
    """Return the verifier of a model that `recis ebrm train` wrote, for the items of pairs.

    Items of a model trained on offers are read from their titles; others from the records of the pairs.

    Raises:
        ConfigError: no model there, or its schema and the pairs' attributes share no type.
    """
    from recis.ebrm.model import EBRM
    from recis.ebrm.runs import DICTIONARIES_NAME

    model = EBRM.load(folder)
    if (Path(folder) / DICTIONARIES_NAME).exists():
        from recis.ebrm.runs import read_dictionaries
        from relevance.pricerunner import ebrm_items

        return EbrmVerifier(model=model, items=ebrm_items(pairs, read_dictionaries(Path(folder)), model.config.schema))
    return EbrmVerifier(model=model, items=_record_items(pairs, model.config.schema))


def _record_items(pairs: Sequence[Pair], schema: Any) -> dict[str, "EbrmItem"]:
    """Return items with the entities of the records, for the types that the schema has."""
    from recis.ebrm.entities import Item

    names = set(schema.names)
    if not names & {"category", "brand", *(name for pair in pairs for name in pair.item.attributes)}:
        raise ConfigError(
            f"the EBRM's types {sorted(names)} are none of the pairs' attributes; train it on their items"
        )
    items = {}
    for pair in pairs:
        stated = {"category": pair.item.category, "brand": pair.item.brand, **pair.item.attributes}
        entities = tuple(schema.entity(name, value) for name, value in stated.items() if name in names and value)
        items[pair.item_id] = Item(id=pair.item_id, entities=entities, title=pair.item.title)
    return items


def write_ebrm_folder(folder: str | Path, train: Sequence[Pair], dev: Sequence[Pair]) -> Path:
    """Write generated pairs as what `recis ebrm train --data FOLDER` reads: schema, items, labels (1 for label 4).

    Raises:
        DataError: a pair has no label.
    """
    from recis.ebrm.datasets import SCHEMA_NAME
    from recis.ebrm.files import LabelRow, write_rows

    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    schema, items = to_ebrm([*train, *dev])
    (home / SCHEMA_NAME).write_text(json.dumps(schema.to_json(), indent=1))
    write_rows(home / "items.jsonl", (item.to_json() for item in items))
    for name, pairs in (("train", train), ("dev", dev)):
        unlabelled = next((pair for pair in pairs if pair.label is None), None)
        if unlabelled is not None:
            raise DataError("needs a label", unit=f"pair {unlabelled.id!r}", column="label")
        rows = (
            LabelRow(query=pair.query, item=pair.item_id, y=int(pair.label == 4), grade=pair.label).to_json()
            for pair in pairs
        )
        write_rows(home / f"labels_{name}.jsonl", rows)
    return home
