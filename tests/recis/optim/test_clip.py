"""One norm over dense and sparse gradients (B17), and that clipping changes only the scale."""

import pytest
import torch

from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.embedding.initializers import Constant
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Sgd, SparseOptimizer, clip_grad_norm
from recis.optim.clip import NonFiniteNorm


def two_columns(lr=1.0):
    config = TableConfig(name="item", features=("f",), embedding_dim=2, initializer=Constant(0.0), optimizer=Sgd(lr=lr))
    return EmbeddingBagCollection([config], seed=1)


def look_up(collection, bags, gradients):
    values = torch.tensor([i for bag in bags for i in bag])
    lengths = torch.tensor([len(bag) for bag in bags])
    out = collection(KeyedJaggedTensor(("f",), values, lengths=lengths, stride=len(bags)))["f"]
    (out * torch.tensor(gradients)).sum().backward()


def dense_of(*gradient):
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


@pytest.mark.parametrize("in_two", [False, True], ids=["one batch", "two micro-batches"])
def test_rows_count_with_their_sums(in_two):
    """B17: dense (3), id 5 twice with (1, 0) and (3, 0): norm 5, not the 4.3589 of unsummed rows."""
    collection, dense = two_columns(), dense_of(3.0)
    optimizer = SparseOptimizer(collection)
    if in_two:
        look_up(collection, [[5]], [[1.0, 0.0]])
        look_up(collection, [[5]], [[3.0, 0.0]])
    else:
        look_up(collection, [[5], [5]], [[1.0, 0.0], [3.0, 0.0]])
    norm = clip_grad_norm([dense, torch.nn.Parameter(torch.zeros(3))], collection, 1.0)
    assert norm.item() == 5.0
    assert dense.grad is not None
    assert dense.grad.item() == pytest.approx(3 * 0.19999996, abs=1e-6)
    optimizer.step()
    weight = collection.table_set["item"].export()["weight"]
    assert weight.tolist() == [pytest.approx([-4 * 0.19999996, 0.0], abs=1e-6)]


def test_small_gradients_stay():
    collection, dense = two_columns(), dense_of(3.0)
    optimizer = SparseOptimizer(collection)
    look_up(collection, [[5]], [[4.0, 0.0]])
    assert clip_grad_norm([dense], collection, 10.0).item() == 5.0
    assert dense.grad is not None
    assert dense.grad.item() == 3.0
    optimizer.step()
    assert collection.table_set["item"].export()["weight"].tolist() == [[-4.0, 0.0]]


def test_clipping_twice_is_seen_by_the_second_norm():
    collection, dense = two_columns(), dense_of(3.0)
    look_up(collection, [[5]], [[4.0, 0.0]])
    clip_grad_norm([dense], collection, 1.0)
    assert clip_grad_norm([dense], collection, 1.0).item() == pytest.approx(1.0, abs=1e-6)


def test_without_tables_or_gradients():
    assert clip_grad_norm([dense_of(3.0, 4.0)], [], 1.0).item() == 5.0
    assert clip_grad_norm([], two_columns(), 1.0).item() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing_and_is_named(value):
    collection, dense = two_columns(), dense_of(3.0)
    look_up(collection, [[5], [6]], [[1.0, 0.0], [value, 0.0]])
    with pytest.raises(NonFiniteNorm, match="table 'item', id 6, step 1; nothing was changed"):
        clip_grad_norm([dense], collection, 1.0)
    assert dense.grad is not None
    assert dense.grad.item() == 3.0
    with pytest.raises(NonFiniteNorm, match="norm of the dense gradients is"):
        clip_grad_norm([dense_of(value)], two_columns(), 1.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_zero(max_norm):
    with pytest.raises(ConfigError, match="max_norm must be above 0"):
        clip_grad_norm([], [], max_norm)
