"""Vocab and Lookup: exact entries, unknown values counted, files checked, changed files refused."""

import pytest
import torch

from recis.errors import ConfigError
from recis.features import FeatureEngine, FeatureSpec, Lookup, Mod, Vocab
from recis.io.batch import RawBatch
from recis.jagged import JaggedTensor


def _raw(**columns) -> RawBatch:
    return RawBatch(columns=columns, num_samples=len(next(iter(columns.values()))))


def _words(path, text: bytes = b"<unknown>\nred\ngreen\n\xc3\xa9t\xc3\xa9\n") -> str:
    path.write_bytes(text)
    return str(path)


def test_vocab_numbers_the_lines(tmp_path):
    spec = FeatureSpec(name="color", kind="sparse", ops=(Vocab(_words(tmp_path / "colors.txt")),))
    engine = FeatureEngine([spec])
    batch = engine.forward(_raw(color=JaggedTensor.from_strings(["green", "blue", "été", "red", "gree"])))
    assert batch.sparse.values.tolist() == [2, 0, 3, 1, 0]
    engine.forward(_raw(color=JaggedTensor.from_strings(["pink"])))
    count = engine.counters()["color"]
    assert (count.unknown, count.looked_up) == (3, 6)
    engine.reset_counters()
    assert engine.counters() == {}


@pytest.mark.parametrize("text", [b"a\nbb\n", b"a\nbb", b"a\r\nbb\r\n"], ids=["lf", "no end", "crlf"])
def test_line_ends(tmp_path, text):
    spec = FeatureSpec(name="w", kind="sparse", ops=(Vocab(_words(tmp_path / "v.txt", text), unknown=-1),))
    batch = FeatureEngine([spec]).forward(_raw(w=JaggedTensor.from_lists([["a", "bb"], ["b", ""]])))
    assert batch.sparse.values.tolist() == [0, 1, -1, -1]


def test_integer_columns_look_integers_up(tmp_path):
    path = _words(tmp_path / "ids.txt", b"7\n-3\n9223372036854775807\n")
    features = [
        FeatureSpec(name="a", kind="sparse", ops=(Vocab(path, unknown=99),)),
        FeatureSpec(name="b", kind="sparse", source="a", ops=(Lookup({7: 1000, 8: -1}, unknown=5), Mod(100))),
    ]
    engine = FeatureEngine(features)
    batch = engine.forward(_raw(a=JaggedTensor.from_lists([[-3, 7], [2**63 - 1, 8]])))
    assert batch.sparse["a"].to_lists() == [[1, 0], [2, 99]]
    assert batch.sparse["b"].to_lists() == [[5, 0], [5, 15]]
    assert {name: count.unknown for name, count in engine.counters().items()} == {"a": 1, "b": 2}


def test_one_call_for_several_vocabularies(tmp_path):
    first, second = _words(tmp_path / "1.txt", b"x\ny\n"), _words(tmp_path / "2.txt", b"y\nx\n")
    features = [
        FeatureSpec(name="a", kind="sparse", source="w", ops=(Vocab(first, unknown=-1),)),
        FeatureSpec(name="b", kind="sparse", source="w", ops=(Vocab(second, unknown=-1),)),
        FeatureSpec(name="c", kind="sparse", source="w", ops=(Lookup({"z": 7}),)),
    ]
    batch = FeatureEngine(features).forward(_raw(w=JaggedTensor.from_strings(["x", "y", "z"])))
    assert batch.sparse.values.tolist() == [0, 1, -1, 1, 0, -1, 0, 0, 7]


def test_a_changed_file_is_refused(tmp_path):
    path = _words(tmp_path / "v.txt", b"a\nb\n")
    saved = FeatureEngine([FeatureSpec(name="w", kind="sparse", ops=(Vocab(path),))]).to_json()
    assert FeatureEngine.from_json(saved).sparse_keys == ("w",)
    _words(tmp_path / "v.txt", b"b\na\n")
    with pytest.raises(ConfigError, match=r"v\.txt: the file has changed"):
        FeatureEngine.from_json(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"a\nb\na\n", "entries 0 and 2 of the vocabulary are equal"), (b"a\n\xff\n", "line 1 is not UTF-8")],
    ids=["twice", "utf8"],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = _words(tmp_path / "v.txt", text)
    with pytest.raises(ConfigError, match=rf"vocabulary .*v\.txt: {message}"):
        FeatureEngine([FeatureSpec(name="w", kind="sparse", ops=(Vocab(path),))]).forward(
            _raw(w=JaggedTensor.from_strings(["a"]))
        )


def test_missing_files_and_wrong_entries_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: cannot be read"):
        FeatureEngine([FeatureSpec(name="w", kind="sparse", ops=(Vocab(str(tmp_path / "none.txt")),))])
    path = _words(tmp_path / "v.txt", b"7\nseven\n")
    engine = FeatureEngine([FeatureSpec(name="w", kind="sparse", ops=(Vocab(path),))])
    with pytest.raises(ConfigError, match=r"entry 1 is b'seven', no integer"):
        engine.forward(_raw(w=torch.tensor([7])))


@pytest.mark.parametrize("pairs", [{1: 2, "a": 3}, (("a", 1), ("a", 2)), {"a": 2**63}, {"a": 1.5}], ids=str)
def test_wrong_maps_are_refused(pairs):
    with pytest.raises(ConfigError, match="Lookup"):
        Lookup(pairs)
