"""Precompute: every text once, batches without waste, kills at any instant, and what a used folder refuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recis.errors import ConfigError, DataError
from recis.towers.batching import length_batches, padding_waste
from recis.towers.precomputation import PrecomputeConfig, precompute
from recis.towers.vector_files import VectorFileError, open_vectors


class LetterCounts:
    """An encoder whose vector is known: counts of the letters a to d; tokens are letters, at most 20 of them."""

    def __init__(self, *, kill_at: int | None = None, name: str = "one") -> None:
        self.calls: list[list[list[int]]] = []
        self.kill_at = kill_at
        self.name = name

    def version(self) -> str:
        return self.name

    def tokenize(self, texts):
        return [[ord(letter) - ord("a") for letter in text][:20] for text in texts]

    def encode(self, token_ids):
        if len(self.calls) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls.append([list(ids) for ids in token_ids])
        return torch.stack(
            [torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=4) for ids in token_ids]
        ).float()


def rows(count: int = 60) -> tuple[np.ndarray, list[str]]:
    """Return ids in no order, some twice, and texts, some alike, one empty and one of 100,000 letters."""
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcd"), size=int(n))) for n in generator.integers(0, 19, count)]
    texts[3], texts[7], texts[9], texts[11] = "", texts[20], texts[20], "b" * 100_000
    ids = generator.permutation(count).astype(np.int64) - 5
    return np.append(ids, ids[20]), [*texts, texts[20]]


CONFIG = PrecomputeConfig(batch_tokens=40, part_rows=10)


def test_every_id_gets_its_texts_vector_and_every_text_is_run_once(tmp_path):
    ids, texts = rows()
    encoder = LetterCounts()
    report = precompute(encoder, ids, texts, tmp_path / "out", CONFIG)
    run = [tuple(row) for call in encoder.calls for row in call]
    assert len(run) == len(set(run)) == report.num_rows == report.num_encoded
    assert report.waste <= 0.05
    file = open_vectors(tmp_path / "out", width=4, version="one")
    assert file.vectors.dtype == torch.float16
    assert len(file.vectors) == report.num_rows < report.num_ids == 60
    vectors, found = file.read(torch.from_numpy(ids))
    assert found.all()
    want = [[min(text[:20].count(letter), 20) for letter in "abcd"] for text in texts]
    assert vectors.tolist() == want
    _, found = file.read(torch.tensor([-6, 55, 2**62]))
    assert not found.any()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [".lock", "MANIFEST.json", "ids.npy", "rows.npy", "vectors.npy"]
    )
    assert precompute(LetterCounts(), ids, texts, tmp_path / "out", CONFIG).num_encoded == 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    ids, texts = rows()
    straight = precompute(LetterCounts(), ids, texts, tmp_path / "straight", CONFIG)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_precomputation as t; from pathlib import Path\n"
        "t.precompute(t.LetterCounts(kill_at=int(sys.argv[3])), *t.rows(), Path(sys.argv[2]), t.CONFIG)"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(out), "9"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run(command, check=False, env=env).returncode == -signal.SIGKILL
    with pytest.raises(VectorFileError, match=r"no MANIFEST\.json"):
        open_vectors(out)
    whole = sorted((out / "parts").glob("[0-9]*.npy"))
    (out / "parts" / ".tmp-000009.npy").write_bytes(b"half a part")
    kept = sum(len(np.load(path)) for path in whole)
    assert 0 < kept < straight.num_rows
    encoder = LetterCounts()
    resumed = precompute(encoder, ids, texts, out, CONFIG)
    assert resumed.num_encoded == sum(map(len, encoder.calls)) == straight.num_rows - kept
    assert content(out) == content(tmp_path / "straight")


def test_a_used_folder_is_refused_for_other_vectors(tmp_path):
    ids, texts = rows(30)
    out = tmp_path / "out"
    precompute(LetterCounts(), ids, texts, out, CONFIG)
    before = content(out)
    changed = ["a" * 5 if text == texts[0] else text for text in texts]
    for encoder, other in ((LetterCounts(name="two"), texts), (LetterCounts(), changed)):
        with pytest.raises(ConfigError, match="other weights, settings or data"):
            precompute(encoder, ids, other, out, CONFIG)
    assert content(out) == before
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty \(it has notes\.txt\)"):
        precompute(LetterCounts(), ids, texts, stray, CONFIG)


def test_bad_rows(tmp_path):
    with pytest.raises(DataError, match="row 2, value 4: an id has two different texts"):
        precompute(LetterCounts(), [4, 1, 4], ["a", "b", "c"], tmp_path / "a")
    with pytest.raises(ConfigError, match="one each per row"):
        precompute(LetterCounts(), [4, 1], ["a"], tmp_path / "b")

    class Huge(LetterCounts):
        def encode(self, token_ids):
            return torch.full((len(token_ids), 2), 1e5)

    with pytest.raises(DataError, match="not finite in float16"):
        precompute(Huge(), [4], ["a"], tmp_path / "c")
    report = precompute(LetterCounts(), np.zeros(0, dtype=np.int64), [], tmp_path / "d")
    assert (report.num_ids, report.num_rows, report.waste) == (0, 0, 0.0)
    assert open_vectors(tmp_path / "d").read(torch.tensor([3]))[1].tolist() == [False]


@given(
    st.lists(st.integers(0, 300), max_size=80),
    st.integers(1, 500),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_batches_hold_every_text_once_within_both_limits(lengths, max_tokens, max_waste):
    batches = length_batches(lengths, max_tokens=max_tokens, max_waste=max_waste)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= max_tokens
        assert padding_waste(lengths, [batch]) <= max_waste + 1e-9
    assert padding_waste(lengths, batches) <= max_waste + 1e-9


def test_batches_by_hand():
    assert length_batches([3, 1, 3, 2, 9], max_tokens=6, max_waste=0.0) == [[1], [3], [0, 2], [4]]
    assert length_batches([3, 1, 3, 2, 9], max_tokens=6, max_waste=0.5) == [[1, 3], [0, 2], [4]]
    assert padding_waste([3, 1, 3, 2, 9], [[1, 3], [0, 2], [4]]) == 1 - 18 / 19
    with pytest.raises(ConfigError, match="max_waste"):
        length_batches([1], max_tokens=1, max_waste=1.0)
