"""Table configs: what they refuse, and which tables share a store (A26)."""

import time

import pytest
import torch

from recis.embedding import (
    AfterSightings,
    ByScore,
    Constant,
    CountMin,
    EmbeddingBagCollection,
    EmbeddingCollection,
    Exact,
    Feature,
    LruCapacity,
    MinNorm,
    Normal,
    TableConfig,
    TableSet,
    Tile,
    TruncatedNormal,
    TtlSteps,
    Uniform,
    WithProbability,
)
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam, RowWiseAdagrad, Sgd


def table(name="item", **changes):
    return TableConfig(**{"name": name, "features": (f"{name}_id",), **changes})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: table(embedding_dim=0), "'item'.*embedding_dim must be at least 1; got 0"),
        (lambda: table(dtype="float64"), "dtype must be 'float32' or 'bfloat16'; got 'float64'"),
        (lambda: table(features=("a", Feature("a", "mean"))), "'item'.*repeat: \\['a'\\]"),
        (lambda: table(features="a"), "must be a tuple; got the string 'a'"),
        (lambda: table(max_rows=0), "max_rows must be at least 1"),
        (lambda: table(unadmitted="nothing"), "'zeros' or 'default_row'; got 'nothing'"),
        (lambda: table(train_default_row=True), "train_default_row needs unadmitted='default_row'"),
        (lambda: table(name=""), "non-empty"),
        (
            lambda: Feature("a", "max"),  # type: ignore[arg-type]
            "pooling must be 'sum', 'mean', 'none' or Tile\\(n\\); got 'max'",
        ),
        (lambda: Tile(0), "Tile: n"),
        (lambda: AfterSightings(0), "AfterSightings: n"),
        (lambda: Exact(0), "max_ids"),
        (lambda: CountMin(eps=1.0), "eps must be inside"),
        (lambda: WithProbability(1.5), "p must be in"),
        (lambda: TtlSteps(0), "TtlSteps: n"),
        (lambda: MinNorm(0, 1), "l2 must be above 0"),
        (lambda: ByScore(len, 0), "ByScore: rows"),  # type: ignore[arg-type]
        (lambda: Uniform(1, 0), "low must not be above high"),
        (lambda: Constant(float("nan")), "Constant: value must be finite"),
        (lambda: TruncatedNormal(0.0), "above 0"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_equal_signatures_share_one_store():
    tables = TableSet(
        [
            table("a", features=(Feature("a", "sum"),)),
            table("b", features=(Feature("b", "mean"), Feature("c", "none")), admission=AfterSightings(2)),
            table("d", eviction=(LruCapacity(5),), optimizer=RowWiseAdagrad(lr=0.5), max_rows=7),
        ],
        seed=1,
    )
    assert len(tables.stores) == 1
    assert [t.number for t in tables] == [0, 1, 2]


@pytest.mark.parametrize(
    "other",
    [{"embedding_dim": 8}, {"dtype": "bfloat16"}, {"optimizer": Sgd(lr=0.1)}, {"initializer": Normal(0.0, 0.1)}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_signatures_get_their_own_store(other):
    assert len(TableSet([table("a"), table("b", **other)], seed=1).stores) == 2


def test_one_name_with_two_signatures_is_an_error_that_shows_both():
    with pytest.raises(ConfigError, match=r"'item' is given twice, with different signatures.*Adam.*Sgd"):
        TableSet([table(optimizer=Adam(lr=0.1)), table(optimizer=Sgd(lr=0.1))], seed=1)
    with pytest.raises(ConfigError, match="given twice"):
        TableSet([table()] * 2, seed=1)


def test_a_feature_belongs_to_one_table():
    with pytest.raises(ConfigError, match="feature 'x' is in tables 'a' and 'b'"):
        TableSet([table("a", features=("x",)), table("b", features=("x",))], seed=1)


def test_unknown_names_suggest_the_nearest():
    tables = TableSet([table("item"), table("user")], seed=1)
    with pytest.raises(KeyError, match="did you mean 'item'"):
        tables["itme"]
    with pytest.raises(ConfigError, match="did you mean 'user_id'"):
        EmbeddingBagCollection(tables, features=["user_idd"])
    collection = EmbeddingBagCollection(tables)
    with pytest.raises(ValueError, match="no feature 'item_id'; did you mean 'item_ids'"):
        collection(KeyedJaggedTensor.from_lists({"item_ids": [[1]], "user_id": [[1]]}))


def test_collections_name_features_of_the_other_kind():
    configs = [table(features=(Feature("history", "none"), Feature("clicked", "sum")))]
    with pytest.raises(ConfigError, match=r"'history' has pooling 'none'.*EmbeddingCollection"):
        EmbeddingBagCollection(configs, seed=1)
    with pytest.raises(ConfigError, match="'clicked' has pooling 'sum'"):
        EmbeddingCollection(configs, seed=1)
    with pytest.raises(ConfigError, match="give seed="):
        EmbeddingBagCollection([table()])


def test_a_shared_set_gives_each_collection_its_features():
    tables = TableSet([table(features=("plain", Feature("history", "none"), Feature("tags", Tile(2))))], seed=1)
    assert list(EmbeddingBagCollection(tables).features) == ["plain", "tags"]
    assert list(EmbeddingCollection(tables).features) == ["history"]
    assert list(EmbeddingCollection(tables, features=["plain"]).features) == ["plain"]
    assert list(EmbeddingCollection([table(features=("plain",))], seed=1).features) == ["plain"]


def test_five_thousand_tables_are_one_store_and_cheap_to_step():
    tables = TableSet([table(f"t{n}", embedding_dim=4) for n in range(5000)], seed=1)
    assert len(tables.stores) == 1
    for n in (0, 4999):
        rows, numbers = tables[f"t{n}"].lookup(torch.tensor([5, 5, -1]), train=True, step=1)
        assert rows.shape == (3, 4)
        assert numbers[0] == numbers[1] != numbers[2]
    tables.end_step(1)
    assert [tables[f"t{n}"].size for n in (0, 1, 4999)] == [2, 0, 2]
    started = time.perf_counter()
    for step in range(2, 12):
        tables["t7"].lookup(torch.tensor([step]), train=True, step=step)
        tables.end_step(step)
    assert time.perf_counter() - started < 2  # a loop over tables and features would take tens of ms per step
