"""Score pairs with a finished model: label probabilities from the prompt alone, tier, and a rationale where asked for.

    scorer = Scorer.load("runs/grpo/final")
    scores = scorer.score(pairs)                    Score(label, p, tier, b_cum, violations, rationale=None, ..) per pair
    score_file(scorer, "pairs.parquet", "scores.parquet")

One prompt, one pass: with a chunk the prompt shows it, without one it is the plain prompt byte for byte. Batch sizes and row
order change nothing but rounding. A rationale continues the label of the prefill, so both cannot disagree on the label.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recis.errors import ConfigError, DataError
from relevance.checkpoints import write_json
from relevance.data import Pair
from relevance.files import Score, iter_pairs, read_rows, write_rows
from relevance.labels import Label, Parsed, find_profile, violations
from relevance.language_model import LanguageModel, load_language_model, model_hash
from relevance.prefill import score_prompts
from relevance.prompts import PromptConfig, Prompts
from relevance.rollouts import SamplingConfig, sample_completions
from relevance.rules import RuleBase
from relevance.scoring import TIERS, cumpt
from relevance.task import Task
from relevance.training_run import GRADER_NAME, find_rules

Chunks = Literal["auto", "none"]
DEFAULT_B = 0.5
BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model with the prompts, the grammar and the threshold it was finished with."""

    lm: LanguageModel
    task: Task
    """Prompts and grammar; its parts are empty."""
    b_cum: float
    model: str
    """sha256 of the weights."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What grader.json says; empty for a model that no recipe finished."""
    batch_tokens: int = 16384

    @classmethod
    def load(
        cls, path: str | Path, *, chunk: Chunks = "auto", rules: str | None = None, device: str | None = None
    ) -> "Scorer":
        """Return the scorer of a folder.

        Args:
            path: `final` of a run, or any model: the latter is asked with the compact profile and b = .5.
            chunk: "auto" shows chunks where the model was trained with them, "none" never.
            rules: "catalog", "none" or module:attribute; None takes what the model was trained with.
            device: None takes a GPU where there is one.

        Raises:
            ConfigError: no model there, or no such rules.
        """
        file = Path(path) / GRADER_NAME
        settings: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        lm = load_language_model(path, chat_template=settings.get("chat_template", False), device=device)
        base = find_rules(rules or settings.get("rules", "none")) or RuleBase(())
        prompts = Prompts(
            rules=base,
            config=PromptConfig(**settings.get("prompt", {"max_prompt_tokens": 4096})),
            num_tokens=lm.num_tokens,
        )
        task = Task(
            train=(),
            dev=(),
            test=(),
            prompts=prompts,
            profile=find_profile(settings.get("profile", "compact")),
            rule_ids=base.ids if base.rules else None,
            render=lm.render,
            with_chunk=bool(settings.get("with_chunk")) and chunk == "auto",
        )
        b = settings.get("b_cum")
        return cls(lm=lm, task=task, b_cum=DEFAULT_B if b is None else b, model=model_hash(path), settings=settings)

    def probs(self, pairs: Sequence[Pair]) -> Tensor:
        """Return P of the labels [N, 4], label 1 first; for a label-last profile 1 at the label of the greedy text."""
        if self.task.profile.is_label_last:
            labels = [parsed.label or 0 for parsed in self.texts(pairs)[1]]
            return torch.nn.functional.one_hot(torch.tensor(labels), 5)[:, 1:].float()
        prompts = [self.task.prompt(pair) for pair in pairs]
        groups = [pair.query_id for pair in pairs]
        return score_prompts(self.lm, prompts, groups, batch_tokens=self.batch_tokens)

    def texts(self, pairs: Sequence[Pair], labels: Sequence[int] | None = None) -> tuple[list[str], list[Parsed]]:
        """Return greedy completions and what they say; with labels they continue those."""
        prompts = [self.task.prompt(pair) for pair in pairs]
        config = SamplingConfig(temperature=0.0, max_completion_tokens=128)
        forced = None if labels is None else [str(label) for label in labels]
        found = [rows[0] for rows in sample_completions(self.lm, prompts, config=config, forced=forced)]
        return [row.text for row in found], [self.task.read(row.text, terminated=row.terminated) for row in found]

    def score(self, pairs: Sequence[Pair], *, rationale: bool = False) -> list[Score]:
        """Return one score per pair, in order.

        Args:
            pairs: their labels are not read.
            rationale: generate the text behind the label; costs a token at a time.
        """
        if not pairs:
            return []
        probs = self.probs(pairs)
        labels = (probs.argmax(1) + 1).tolist()
        tiers = cumpt(probs, self.b_cum).tolist()
        texts, parsed = self.texts(pairs, labels) if rationale else ([None] * len(pairs), None)
        scores = []
        for row, pair in enumerate(pairs):
            said = Parsed(label=Label(labels[row])) if parsed is None else parsed[row]
            scores.append(
                Score(
                    id=pair.id,
                    label=labels[row],
                    p=tuple(probs[row].tolist()),
                    tier=TIERS[tiers[row]],
                    b_cum=self.b_cum,
                    rationale=texts[row],
                    violations=violations(said, pair),
                    model=self.model,
                )
            )
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredFile:
    """What became of a file."""

    num_scored: int
    num_bad: int
    errors: Path
    """One line per bad row, {"row": 17, "reason": ".."}; absent when there is none."""


def score_file(scorer: Scorer, source: str | Path, out: str | Path, *, rationale: bool = False) -> ScoredFile:
    """Score a file of pairs in blocks, going on behind the blocks that are done, and write the scores in its order.

    Bad rows (wrong values, prompts that are too long) are left out and listed beside the output.

    Raises:
        ConfigError: no such file, or no row of it can be scored; `out` ends in neither .jsonl nor .parquet.
    """
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise ConfigError(f"--in {source}: no such file; give pairs as .jsonl or .parquet")
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out {out}: files end in .jsonl or .parquet")
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    key = {
        "source": str(source.resolve()),
        "bytes": source.stat().st_size,
        "model": scorer.model,
        "rationale": rationale,
    }
    stamp = parts / "source.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != key:
        for path in parts.iterdir():  # of another file or model
            path.unlink()
        write_json(stamp, key)
    rows = iter_pairs(source)
    number = 0
    while block := list(islice(rows, BLOCK_ROWS)):
        _score_block(scorer, block, number, parts, rationale=rationale)
        number += 1
    scores = [row for part in range(number) for row in read_rows(parts / f"{part:06d}.jsonl", Score)]
    bad = [line for part in range(number) for line in (parts / f"{part:06d}.bad").read_text().splitlines()]
    errors = out.with_name(out.name + ".errors.jsonl")
    errors.unlink(missing_ok=True)
    if bad:
        errors.write_text("\n".join(bad) + "\n", encoding="utf-8")
    if not scores:
        raise ConfigError(
            f"--in {source}: no row can be scored; reasons in {errors}" if bad else f"--in {source}: no rows"
        )
    write_rows(out, scores)
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()
    return ScoredFile(num_scored=len(scores), num_bad=len(bad), errors=errors)


def _score_block(
    scorer: Scorer, block: Sequence[Pair | DataError], number: int, parts: Path, *, rationale: bool
) -> None:
    """Score a block into its files, unless they are there."""
    done = parts / f"{number:06d}.bad"
    if done.exists():
        return
    pairs, bad = [], []
    for place, row in enumerate(block):
        try:
            if isinstance(row, DataError):
                raise row
            scorer.task.prompt(row)  # refuses what is too long
            pairs.append(row)
        except DataError as error:
            bad.append(json.dumps({"row": number * BLOCK_ROWS + place, "reason": str(error)}, ensure_ascii=False))
    write_rows(parts / f"{number:06d}.jsonl", scorer.score(pairs, rationale=rationale))
    part = done.with_name(done.name + ".part")
    part.write_text("\n".join(bad), encoding="utf-8")
    part.rename(done)
