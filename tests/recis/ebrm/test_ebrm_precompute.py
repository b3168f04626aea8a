"""`recis ebrm precompute` killed with SIGKILL and started again; and the scores of a model that is no longer there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recis.cli import main
from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, QEScorer, TypeConfig
from recis.ebrm.cache import QECache, hash_query
from recis.ebrm.files import write_rows
from recis.ebrm.persist import CACHE_NAME
from recis.ebrm.segment import CacheVersionError

SCHEMA = EntitySchema(types=(TypeConfig(name="colour"),))
NUM_QUERIES, NUM_COLOURS = 250, 400
NUM_PAIRS = NUM_QUERIES * (NUM_COLOURS + 1)  # and colour:none
QUERIES = [f"query {number}" for number in range(NUM_QUERIES)]


def logit_of(number: int) -> float:
    return -8 + number / 16  # exact in fp16


def save_model(folder: Path, default: float) -> EBRM:
    """A model in which query n wants colour n by a logit of its own, and every other colour by the default."""
    table = {(query, f"colour:c{number}"): logit_of(number) for number, query in enumerate(QUERIES)}
    model = EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(table, default=default))
    model.save(folder)
    return model


def items() -> list[Item]:
    colours = [SCHEMA.entity("colour", f"c{number}") for number in range(NUM_COLOURS)]
    return [Item(id=str(first), entities=tuple(colours[first : first + 20])) for first in range(0, NUM_COLOURS, 20)]


@pytest.fixture
def home(tmp_path):
    save_model(tmp_path / "run", 0.5)
    write_rows(tmp_path / "items.jsonl", (item.to_json() for item in items()))
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))
    return tmp_path


def words(home: Path) -> list[str]:
    files = ["--queries", f"{home}/queries.txt", "--items", f"{home}/items.jsonl"]
    return ["ebrm", "precompute", "--model", f"{home}/run", *files]


def cached(home: Path) -> dict[tuple[str, str], float]:
    """Return every cached pair of the folder with its logit."""
    version = EBRM.load(home / "run").version
    cache = QECache.open(home / "run" / CACHE_NAME, model_version=version)
    rows = {query: cache.get_row(hash_query(query)) for query in QUERIES}
    return {
        (query, cache.vocabulary.ids[entity]): float(logit)
        for query, row in rows.items()
        for entity, logit in zip(row.entities.tolist(), row.logits, strict=True)
    }


def kill_after_one_flush(home: Path) -> int:
    """Start the command, kill it once it has told of new pairs that it flushed, and return how many those were."""
    command = [sys.executable, "-m", "recis", *words(home)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as run:
        assert run.stdout is not None
        told = (re.search(r"([\d,]+) pairs encoded", line) for line in run.stdout)
        counts = (int(found[1].replace(",", "")) for found in told if found)
        count = next(count for count in counts if count)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    return count


def test_killed_and_started_again_nothing_is_lost_and_nothing_kept_is_scored_twice(home, capsys):
    before: dict[tuple[str, str], float] = {}
    for _ in range(2):
        told = kill_after_one_flush(home)
        kept = cached(home)
        assert len(kept) >= len(before) + told  # what was told of is there, and what was there before
        assert before.items() <= kept.items()
        before = kept
    assert len(before) < NUM_PAIRS
    assert main(words(home)) == 0
    encoded = re.search(r"([\d,]+) were encoded now; 0 failed", capsys.readouterr().out)
    assert encoded is not None
    assert int(encoded[1].replace(",", "")) == NUM_PAIRS - len(before)  # not one of those that were kept
    after = cached(home)
    assert len(after) == NUM_PAIRS
    assert before.items() <= after.items()
    for number, query in enumerate(QUERIES):
        assert after[query, f"colour:c{number}"] == logit_of(number)
        assert after[query, "colour:none"] == 0.5
    assert main(words(home)) == 0
    assert "0 were encoded now; 0 failed" in capsys.readouterr().out


def test_no_score_of_another_model_version_is_served(home, capsys):
    (home / "queries.txt").write_text("\n".join(QUERIES[:3]))
    assert main(words(home)) == 0
    old = EBRM.load(home / "run")
    assert old.score(QUERIES[0], items()[:1]).encoder_calls == 0
    new = save_model(home / "run", -0.5)  # trained again into the same folder
    assert new.version != old.version
    with pytest.raises(CacheVersionError, match=f"{old.version}, the model is {new.version}"):
        EBRM.load(home / "run")
    capsys.readouterr()
    score = ["ebrm", "score", "--model", f"{home}/run", "--query", QUERIES[0], "--items", f"{home}/items.jsonl"]
    for command in (words(home), score, ["ebrm", "serve", "--model", f"{home}/run"]):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert f"the model is {new.version}" in err
        assert "rebuild" in err
    assert main([*words(home), "--rebuild"]) == 0
    assert f"{3 * (NUM_COLOURS + 1):,} were encoded now" in capsys.readouterr().out
    scored = EBRM.load(home / "run").score(QUERIES[0], items())
    assert scored.encoder_calls == 0
    assert (scored.r == new.score(QUERIES[0], items()).r).all()
    assert not np.isclose(scored.r, old.score(QUERIES[0], items()).r).any()
