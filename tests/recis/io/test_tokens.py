"""A column with a tokenizer: the batch has the token ids that the tower would make, and the reader's threads make them."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.errors import ConfigError, DataError
from recis.features import FeatureEngine, FeatureSpec
from recis.io import DataConfig, Reader, Strings
from recis.io import decode as decode_module
from recis.jagged import JaggedTensor

tokenizers = pytest.importorskip("tokenizers")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "lace", "dress")


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of whole words with [CLS] and [SEP] around a text."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding()  # what a file may say does not reach the batch
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def read(path, texts, **column):
    pq.write_table(pa.table({"title": pa.array(texts, pa.string())}), path / "t.parquet")
    config = DataConfig(
        paths=(str(path / "t.parquet"),), format="parquet", columns=(Strings("title", **column),), batch_size=8
    )
    with Reader(config) as reader:
        return list(reader)


def test_by_hand(folder, tmp_path):
    (batch,) = read(tmp_path, ["red dress", "", "lace " * 50_000, "blue"], tokenizer=folder, max_tokens=4)
    ids = batch.jagged("title")
    bags = [ids.flat_values[low:high].tolist() for low, high in zip(ids.offsets[:-1], ids.offsets[1:], strict=True)]
    assert bags == [[2, 4, 6, 3], [2, 3], [2, 5, 5, 3], [2, 1, 3]]


def test_the_readers_threads_tokenize(folder, tmp_path, monkeypatch):
    threads, made = set(), decode_module.tokenize

    def spy(*given):
        threads.add(threading.current_thread().name)
        return made(*given)

    monkeypatch.setattr(decode_module, "tokenize", spy)
    read(tmp_path, ["red"] * 20, tokenizer=folder)
    assert threads
    assert all(name.startswith("recis-read") for name in threads)


def test_ids_reach_the_batch_as_an_extra(folder, tmp_path):
    (raw,) = read(tmp_path, ["red"], tokenizer=folder)
    batch = FeatureEngine((FeatureSpec(name="title", kind="extra"),)).forward(raw)
    title = batch.extras["title"]
    assert isinstance(title, JaggedTensor)
    assert title.flat_values.tolist() == [2, 4, 3]


def test_bad_settings(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json here"):
        read(tmp_path, ["red"], tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"max_tokens of at least 3; got depth=0, utf8=True, max_tokens=2"):
        Strings("title", tokenizer=folder, max_tokens=2)
    with pytest.raises(ConfigError, match="depth=1"):
        Strings("title", tokenizer=folder, depth=1)
    with pytest.raises(DataError, match="a null, and the column has no default"):
        read(tmp_path, [None], tokenizer=folder)


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used with max_tokens=64"):
        read(tmp_path, ["red"], tokenizer=folder)
