"""Reader and engine together: columns of a Parquet file become a Batch, and faults name the file's row."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.errors import DataError
from recis.features import Bucketize, FeatureEngine, FeatureSpec, Flatten, Hash, Log, Sequence, TimeWindow
from recis.io import DataConfig, Dense, Floats, Ids, Integer, Label, Reader, Strings

COLUMNS = (
    Strings("title"),
    Strings("tags", depth=1),
    Ids("clicks", weights="click_weights"),
    Ids("carts", depth=2),
    Ids("times"),
    Floats("prices"),
    Integer("now"),
    Dense("price"),
    Dense("vector", width=2),
    Label("click"),
    Label("buy", optional=True),
)
FEATURES = (
    FeatureSpec(name="title", kind="sparse", ops=(Hash("farm", 100),)),
    FeatureSpec(name="tags", kind="sparse", ops=(Hash("farm"),)),
    FeatureSpec(name="clicks", kind="sparse", ops=(Sequence(TimeWindow(10, time="times", now="now")),)),
    FeatureSpec(name="carts", kind="sparse", ops=(Flatten(),)),
    FeatureSpec(name="prices", kind="sparse", ops=(Bucketize((1.0, 2.0)),)),
    FeatureSpec(name="price", kind="dense", ops=(Log(),)),
    FeatureSpec(name="vector", kind="dense"),
    FeatureSpec(name="click", kind="label"),
    FeatureSpec(name="buy", kind="label"),
)


def _table(prices=(0.0, 1.0, 3.0)) -> pa.Table:
    return pa.table(
        {
            "title": ["hello", "abc", ""],
            "tags": [["hello"], [], ["abc", "hello"]],
            "clicks": [[1, 2], [], [-3]],
            "click_weights": pa.array([[0.5, 2.0], [], [1.0]], pa.list_(pa.float32())),
            "carts": [[[1], [2, 3]], [], [[]]],
            "times": [[80, 95], [], [100]],
            "now": [100, 100, 100],
            "prices": pa.array([[1.0, 0.5], [], [9.0]], pa.list_(pa.float32())),
            "price": pa.array(prices, pa.float32()),
            "vector": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
            "click": [1.0, 0.0, 1.0],
            "buy": [1.0, None, 0.0],
        }
    )


def _batch(tmp_path, table: pa.Table):
    pq.write_table(table, tmp_path / "log.parquet")
    config = DataConfig(paths=(str(tmp_path / "log.parquet"),), format="parquet", columns=COLUMNS, batch_size=3)
    engine = FeatureEngine(FEATURES, columns=config.columns)
    with Reader(config) as reader:
        (raw,) = list(reader)
    return engine.forward(raw)


def test_a_file_becomes_a_batch(tmp_path):
    batch = _batch(tmp_path, _table())
    hello, abc = -5436999610281751320, 2640714258260161385
    assert {key: feature.to_lists() for key, feature in batch.sparse.to_dict().items()} == {
        "title": [[hello % 2**64 % 100], [abc % 100], [-7286425919675154353 % 2**64 % 100]],
        "tags": [[hello], [], [abc, hello]],
        "clicks": [[2], [], [-3]],
        "carts": [[1, 2, 3], [], []],
        "prices": [[1, 0], [], [2]],
    }
    clicks = batch.sparse["clicks"]
    assert clicks.weights is not None
    assert clicks.weights.tolist() == [2.0, 1.0]
    assert batch.dense[:, 0].tolist() == pytest.approx([0.0, math.log(2), math.log(4)])
    assert batch.dense[:, 1:].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert batch.label_mask is not None
    assert batch.label_mask.tolist() == [[True, True], [True, False], [True, True]]


def test_a_fault_names_the_row_of_the_file(tmp_path):
    with pytest.raises(DataError) as caught:
        _batch(tmp_path, _table(prices=(0.0, 1.0, -2.0)))
    error = caught.value
    assert str(error.file).endswith("log.parquet")
    assert (error.unit, error.row, error.column, error.value) == ("row group 0", 2, "price", -2.0)
