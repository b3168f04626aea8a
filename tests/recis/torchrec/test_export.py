"""A collection as TorchRec's and back: equal outputs, equal training after, state carried or refused by name."""

from typing import Any

import pytest
import torch

from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, Feature, TableConfig, Tile
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adagrad, Adam, Ftrl, RowWiseAdagrad, Sgd, SparseOptimizer

pytestmark = pytest.mark.torchrec
OPTIMIZERS = [Sgd(lr=0.1), Adagrad(lr=0.1, h0=0.5), RowWiseAdagrad(lr=0.1)]
IDS = {"item": [[5, -(2**63)], [], [7, 5, 5]], "seen": [[2**63 - 1], [5, 7], []], "shop": [[0], [1], [0, 1]]}
UNKNOWN = {"item": [[5, 99], [], [98]], "seen": [[97, 7], [-1], []], "shop": [[3], [1], []]}
WEIGHTS = {key: [[0.5 + id_ % 3 for id_ in bag] for bag in bags] for key, bags in IDS.items()}


@pytest.fixture(autouse=True)
def _installed():
    """Skip without it; imported here and not above, so that tests of other parts are collected without it."""
    pytest.importorskip("torchrec")


def tables(pooling: Any = "sum", **settings: Any) -> list[TableConfig]:
    """Return a table with two features and one of another width and optimizer."""
    settings = {"optimizer": RowWiseAdagrad(lr=0.1), "embedding_dim": 3} | settings
    return [
        TableConfig(name="item_id", features=(Feature("item", pooling), Feature("seen", pooling)), **settings),
        TableConfig(name="shop", features=(Feature("shop", "none" if pooling == "none" else "mean"),), **settings),
    ]


def trained(configs: list[TableConfig], kind: type = EmbeddingBagCollection, num_steps: int = 2) -> Any:
    """Return a collection that has been trained on IDS."""
    collection = kind(configs, seed=4)
    step_on(collection, num_steps)
    return collection


def step_on(collection: Any, num_steps: int) -> None:
    """Train on IDS by a loss whose gradients differ between bags."""
    optimizer = SparseOptimizer(collection)
    for _ in range(num_steps):
        out = collection(KeyedJaggedTensor.from_lists(IDS))
        loss(dict(out)).backward()
        optimizer.step()
        collection.end_step(collection.table_set.step + 1)


def loss(vectors: dict[str, Any]) -> torch.Tensor:
    """Return a loss of {feature: vectors}, in the order of the names."""
    values = [
        vectors[key] if isinstance(vectors[key], torch.Tensor) else vectors[key].values for key in sorted(vectors)
    ]
    values = [value() if callable(value) else value for value in values]
    return torch.stack([(value * (value + 1 + number)).sum() for number, value in enumerate(values)]).sum()


def assert_same_vectors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, vectors in ours.items():
        torch.testing.assert_close(theirs[name], vectors, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unadmitted", ["zeros", "default_row"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pooled_outputs_are_equal(pooling, unadmitted):
    from recis.torchrec import to_torchrec

    collection = trained(tables(pooling, unadmitted=unadmitted)).eval()
    exported = to_torchrec(collection)
    for ids in (IDS, UNKNOWN):
        batch = KeyedJaggedTensor.from_lists(ids)
        assert_same_vectors(collection(batch), exported(batch.to_torchrec()).to_dict())


def test_weights_count_where_asked():
    from recis.torchrec import to_torchrec

    configs = [TableConfig(name="item", features=("item", "seen"), embedding_dim=3)]
    collection = trained(configs).eval()
    batch = KeyedJaggedTensor.from_lists(IDS, weights=WEIGHTS)
    exported = to_torchrec(collection, is_weighted=True)
    assert_same_vectors(collection(batch), exported(batch.to_torchrec()).to_dict())
    with pytest.raises(ValueError, match="export with is_weighted=True"):
        to_torchrec(collection)(batch.to_torchrec())


def test_unpooled_outputs_are_equal():
    from recis.torchrec import to_torchrec

    collection = trained(tables("none"), EmbeddingCollection).eval()
    exported = to_torchrec(collection)
    for ids in (IDS, UNKNOWN):
        batch = KeyedJaggedTensor.from_lists(ids)
        ours, theirs = collection(batch), exported(batch.to_torchrec())
        assert_same_vectors(
            {name: vectors.values for name, vectors in ours.items()},
            {name: vectors.values() for name, vectors in theirs.items()},
        )
        assert all(torch.equal(ours[name].lengths, theirs[name].lengths()) for name in ours)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_training_goes_on_there_and_comes_back(optimizer):
    """Two steps here, two there with the state carried, one here again: the same as five here."""
    from recis.torchrec import from_torchrec, to_torchrec

    stayed, left = (trained(tables(optimizer=optimizer)) for _ in range(2))
    exported = to_torchrec(left)
    theirs = exported.optimizer()
    for _ in range(2):
        theirs.zero_grad(set_to_none=True)
        loss(exported(KeyedJaggedTensor.from_lists(IDS).to_torchrec()).to_dict()).backward()
        theirs.step()
    back = from_torchrec(exported, optimizer=optimizer, seed=4, trained_by=theirs)
    step_on(stayed, 3)
    step_on(back, 1)
    for table in stayed.table_set:
        want, got = table.export(), back.table_set[table.name].export()
        assert torch.equal(want["ids"], got["ids"])
        for field in ("weight", *(name for name in want if name.startswith("state."))):
            torch.testing.assert_close(got[field], want[field], rtol=1e-5, atol=1e-7)
    assert [feature.pooling for feature in back.features.values()] == ["sum", "sum", "mean"]


def test_a_trained_last_row_becomes_the_default_row():
    from recis.torchrec import from_torchrec, to_torchrec

    exported = to_torchrec(trained(tables()))
    bags: Any = exported.embeddings.embedding_bags
    with torch.no_grad():
        bags["shop"].weight[-1] = torch.tensor([1.0, 2.0, 3.0])
    back = from_torchrec(exported, optimizer=Sgd(lr=0.1), seed=4).eval()
    batch = KeyedJaggedTensor.from_lists(UNKNOWN)
    assert_same_vectors(back(batch), exported(batch.to_torchrec()).to_dict())
    assert back(batch)["shop"][0].tolist() == [1.0, 2.0, 3.0]


def test_tables_of_torchrec_come_with_their_row_numbers_as_ids():
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecBags

    from recis.torchrec import from_torchrec

    configs = [
        EmbeddingBagConfig(name="a", num_embeddings=5, embedding_dim=4, feature_names=["a", "b"]),
        EmbeddingBagConfig(name="c", num_embeddings=3, embedding_dim=2, feature_names=["c"], data_type=DataType.FP16),
    ]
    theirs = TorchRecBags(configs)
    ours = from_torchrec(theirs, optimizer={"a": Adam(lr=0.1), "c": Ftrl(lr=0.1)}, seed=1).eval()
    batch = KeyedJaggedTensor.from_lists({"a": [[0, 4]], "b": [[3]], "c": [[2, 2, 1]]})
    torch.testing.assert_close(dict(ours(batch)), theirs(batch.to_torchrec()).to_dict(), rtol=1e-3, atol=1e-3)
    assert ours.table_set["a"].ids().tolist() == [0, 1, 2, 3, 4]


def test_vocabulary_by_hand():
    from recis.torchrec import FixedVocabulary

    vocabulary = FixedVocabulary({"t": torch.tensor([-3, 0, 9]), "none": torch.empty(0, dtype=torch.int64)}, {"f": "t"})
    assert vocabulary.rows_of("t", torch.tensor([9, -3, 1, 0, 10, -4])).tolist() == [2, 0, 3, 1, 3, 3]
    assert vocabulary.rows_of("none", torch.tensor([9])).tolist() == [0]
    batch = KeyedJaggedTensor.from_lists({"g": [[7], [7]], "f": [[9, 8], []]}).to_torchrec()
    mapped = vocabulary(batch)
    assert mapped.values().tolist() == [7, 7, 2, 3]
    assert mapped.lengths().data_ptr() == batch.lengths().data_ptr()
    with pytest.raises(ConfigError, match="table 't': the ids of a vocabulary must be"):
        FixedVocabulary({"t": torch.tensor([0, 0])}, {})
    with pytest.raises(ConfigError, match="feature 'f' is of table 'u', which has no vocabulary"):
        FixedVocabulary({}, {"f": "u"})


@pytest.mark.parametrize(
    "optimizer", [Adam(lr=0.1), Ftrl(lr=0.1), Sgd(lr=0.1, momentum=0.9), Adagrad(lr=0.1, weight_decay=0.1)], ids=str
)
def test_state_that_cannot_go_along_is_refused_by_name(optimizer):
    from recis.torchrec import from_torchrec, to_torchrec

    exported = to_torchrec(trained(tables(optimizer=optimizer)))
    with pytest.raises(ConfigError, match=f"table 'item_id' is trained by {type(optimizer).__name__}"):
        exported.optimizer()
    dense = torch.optim.Adam(exported.parameters())
    loss(exported(KeyedJaggedTensor.from_lists(IDS).to_torchrec()).to_dict()).backward()
    dense.step()
    with pytest.raises(ConfigError, match=r"table 'item_id': trained_by holds \['exp_avg', 'exp_avg_sq'\]"):
        from_torchrec(exported, optimizer=optimizer, seed=1, trained_by=dense)


def test_what_torchrec_has_no_form_for_is_refused_by_name():
    from recis.torchrec import from_torchrec, to_torchrec

    def export(kind: type, *features: Feature, is_weighted: bool = False) -> None:
        to_torchrec(kind([TableConfig(name="t", features=features)], seed=1), is_weighted=is_weighted)

    with pytest.raises(ConfigError, match=r"feature 'a' has pooling Tile\(n=2\)"):
        export(EmbeddingBagCollection, Feature("a", Tile(2)))
    with pytest.raises(ConfigError, match="table 't' is pooled by sum and by mean"):
        export(EmbeddingBagCollection, Feature("a", "sum"), Feature("b", "mean"))
    with pytest.raises(ConfigError, match="table 't': torch has no weighted mean"):
        export(EmbeddingBagCollection, Feature("a", "mean"), is_weighted=True)
    widths = [TableConfig(name=name, features=(name,), embedding_dim=dim) for name, dim in (("a", 2), ("b", 3))]
    with pytest.raises(ConfigError, match=r"one width for all tables; these have \{'a': 2, 'b': 3\}"):
        to_torchrec(EmbeddingCollection(widths, seed=1))
    with pytest.raises(ConfigError, match="got Linear"):
        from_torchrec(torch.nn.Linear(1, 1), optimizer=Sgd(lr=0.1), seed=1)  # pyright: ignore[reportArgumentType]
    for name in ("a.b", "items", "training"):
        with pytest.raises(ConfigError, match=f"table '{name}': TorchRec makes a module's name of a table's"):
            to_torchrec(EmbeddingBagCollection([TableConfig(name=name, features=("f",))], seed=1))
    exported = to_torchrec(EmbeddingBagCollection(tables(), seed=1))
    with pytest.raises(ConfigError, match="table 'shop': no optimizer is given for it"):
        from_torchrec(exported, optimizer={"item_id": Sgd(lr=0.1)}, seed=1)


def test_rows_of_several_processes_are_refused_by_name():
    from recis.distributed.ranks import Ranks
    from recis.distributed.tables import share_tables
    from recis.torchrec import StaticEmbeddingBagCollection, to_torchrec

    collection = EmbeddingBagCollection([TableConfig(name="t", features=("f",))], seed=1)
    share_tables(collection.table_set, Ranks(0, 2))
    for use in (to_torchrec, StaticEmbeddingBagCollection.from_collection):
        with pytest.raises(ConfigError, match="table 't': its rows are shared by several processes; save a checkpoint"):
            use(collection)
