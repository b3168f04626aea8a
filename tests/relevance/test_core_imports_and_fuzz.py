"""The pure core imports no training framework, and no text breaks it."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from graded_pairs import make_pair

from relevance.grammar import parse
from relevance.labels import PROFILES, TAGS, violations
from relevance.rewards import outcome, shaped, step_rewards
from relevance.steps import step_ids
from relevance.verify import gold_verdicts

ROOT = Path(__file__).parents[2]
ENGINE = {
    "engine", "trainer", "guided_rollouts", "token_head",
    "training_run", "sampling_stage", "preference_stage", "step_verifiers",
    "serve", "judge", "export", "demo", "ladder", "ladder_report", "sft_loss",
}  # fmt: skip
"""Modules that may import the training framework, or those that do."""
CORE = sorted(path.stem for path in (ROOT / "relevance").glob("*.py") if path.stem not in {"__init__", "cli", *ENGINE})
BLOCKED = ("transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "recis.trainer")


def test_the_core_imports_without_a_training_framework():
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
import {", ".join(f"relevance.{name}" for name in CORE)}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def texts(count, seed):
    """Yield random, cut, changed and decoded strings."""
    rng = Random(seed)
    good = "4<category>match</category><attribute>colour=red:ok;size=big:miss</attribute><rule>E01</rule><verdict>4</verdict>"
    pieces = [
        *"12345 <>/=:;\n",
        "\ufffd",
        "é",
        "４",
        "\x00",
        *(f"<{tag}>" for tag in TAGS),
        *(f"</{tag}>" for tag in TAGS),
    ]
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield "".join(rng.choice(pieces) for _ in range(rng.randrange(20)))
        elif kind == 1:
            yield good[: rng.randrange(len(good) + 1)]
        elif kind == 2:
            place = rng.randrange(len(good))
            yield good[:place] + rng.choice(pieces) + good[place + rng.randrange(3) :]
        else:
            yield rng.randbytes(rng.randrange(40)).decode("utf-8", "replace")


def fuzz(count, seed):
    pair = make_pair(4, attributes={"colour": "ok"}, negated=("lace",), record={"closure": "lace"})
    for profile in (PROFILES["compact"], PROFILES["dyknow"]):
        parsed = []
        for text in texts(count // 2, seed):
            parse_ = parse(text, profile)
            violations(parse_, pair)
            ids = step_ids([bytes([byte]) for byte in text.encode()], parse_, profile)
            assert not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < profile.num_steps
            parsed.append(parse_)
        pairs = [pair] * len(parsed)
        for function in (outcome, shaped):
            total = function(parsed, pairs).total
            assert bool(((total >= 0) & (total <= 1)).all())
        steps = step_rewards(parsed, pairs, profile, gold_verdicts)
        assert bool((steps.isnan() | (steps == 0) | (steps == 1)).all())
        assert torch.equal(steps[:, 0] == 1, torch.tensor([p.ok and p.label == 4 for p in parsed]))


def test_no_text_breaks_the_core():
    fuzz(4000, seed=0)


@pytest.mark.slow
def test_no_text_of_many_breaks_the_core():
    fuzz(100_000, seed=1)
