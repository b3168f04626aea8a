"""One Parquet file with ids, text as strings and as tokens, image paths and vectors: what is missing is masked and counted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.embedding import TableConfig
from recis.errors import ConfigError, DataError
from recis.features import FeatureEngine, FeatureSpec
from recis.io import DataConfig, Floats, Ids, Label, Reader, Strings
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.towers.column import ColumnTowerConfig
from recis.towers.image import ImageTowerConfig
from recis.towers.ranker import WithTowers
from recis.towers.text import TextTowerConfig

ROWS = {
    "user": [1, 2, 3],
    "text": ["w1 w2", None, "w3"],
    "title": ["w4", "w5 w6", None],
    "image": ["a.png", "", None],
    "vector": [[1.0, 2.0], None, [3.0, 4.0]],
    "click": [1, 0, 1],
}
FEATURES = (
    FeatureSpec(name="user", kind="sparse"),
    *(FeatureSpec(name=name, kind="extra") for name in ("text", "title", "image", "vector")),
    FeatureSpec(name="click", kind="label"),
)


@pytest.fixture
def vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    image.fromarray(np.full((8, 8, 3), 99, dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "vit"


def batch_of(folder, tokenizer, **changes):
    pq.write_table(pa.table({**ROWS, **changes}), folder / "rows.parquet")
    columns = (
        Ids("user"), Strings("text", default=""), Strings("title", default="", tokenizer=str(tokenizer), max_tokens=8),
        Strings("image", default=""), Floats("vector", default=()), Label("click"),
    )  # fmt: skip
    config = DataConfig(paths=(str(folder / "rows.parquet"),), format="parquet", columns=columns, batch_size=8)
    with Reader(config) as reader:
        return FeatureEngine(FEATURES).forward(next(iter(reader)))


def model_of(folder, bert, vit):
    widths = {"text": 3, "title": 4, "image": 2, "vector": 5}
    towers = (
        TextTowerConfig(name="text_", column="text", path=str(bert), out_width=3),
        TextTowerConfig(name="title_", column="title", path=str(bert), out_width=4),
        ImageTowerConfig(name="image_", column="image", path=str(vit), root=str(folder), out_width=2),
        ColumnTowerConfig(name="vector_", column="vector", vector_width=2, out_width=5),
    )
    dense = tuple(DenseInput(f"{name}_", width) for name, width in widths.items())
    tables = (TableConfig(name="user", features=("user",), embedding_dim=4),)
    return WithTowers(ranker=DeepFMConfig(tables=tables, dense=dense, hidden=(8,)), towers=towers).build()


def test_all_modalities_side_by_side(bert_folder, vit, tmp_path):
    model, batch = model_of(tmp_path, bert_folder, vit), batch_of(tmp_path, bert_folder)
    assert model(batch).shape == (3, 1)
    out = {name: tower(batch) for name, tower in model.towers.items()}
    there = {name: value.abs().sum(1).gt(0).tolist() for name, value in out.items()}
    assert there["text_"] == [True, False, True]
    assert there["title_"] == [True, True, False]
    assert there["vector_"] == [True, False, True]
    assert {name: model.towers[name].num_missing for name in there} == {
        "text_": 2,
        "title_": 2,
        "image_": 4,
        "vector_": 2,
    }
    want = model.get_submodule("towers.vector_.projection")(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(out["vector_"][2], want)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vector": [[1.0, 2.0], [1.0], [3.0, 4.0]]}, "a vector must have 2 numbers, or none at all"),
        ({"image": ["a.png", "b.png", None]}, "the image cannot be read"),
        ({"vector": [[1.0, 2.0], [1.0, float("nan")], None]}, "NaN or infinite inside a list"),
        ({"text": [b"w1", b"\xff", b"w3"]}, "bytes that are no UTF-8"),
    ],
    ids=["width", "image", "nan", "utf8"],
)
def test_a_bad_cell_is_named(bert_folder, vit, tmp_path, changes, text):
    model = model_of(tmp_path, bert_folder, vit)
    with pytest.raises(DataError, match=text) as caught:
        model(batch_of(tmp_path, bert_folder, **changes))
    assert caught.value.row == 1
    assert caught.value.column == next(iter(changes))


def test_bad_settings(bert_folder, vit, tmp_path):
    with pytest.raises(ConfigError, match="vector_width must be at least 1; got 0"):
        ColumnTowerConfig(name="v", column="vector", vector_width=0)
    tower = ColumnTowerConfig(name="v", column="vectr", vector_width=2).build()
    with pytest.raises(ConfigError, match=r"no lists of numbers 'vectr'; did you mean 'vector'"):
        tower(batch_of(tmp_path, bert_folder))
