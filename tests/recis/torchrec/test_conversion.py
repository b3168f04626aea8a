"""Batches and features to TorchRec and back without a copy; what has no form on the other side; TorchRec missing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.jagged import JaggedTensor, KeyedJaggedTensor

pytestmark = pytest.mark.torchrec
ROOT = Path(__file__).parents[3]


def bags_of(stride: int) -> st.SearchStrategy:
    """Return lists of `stride` bags."""
    ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)
    return st.lists(ids, min_size=stride, max_size=stride)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_batch_goes_there_and_back_over_the_same_storage(data):
    pytest.importorskip("torchrec")
    stride = data.draw(st.integers(0, 3))
    features = {f"f{number}": data.draw(bags_of(stride)) for number in range(data.draw(st.integers(0, 3)))}
    weights = {key: [[0.5] * len(bag) for bag in bags] for key, bags in features.items()}
    batch = KeyedJaggedTensor.from_lists(features, weights=weights if data.draw(st.booleans()) else None, stride=stride)
    theirs = batch.to_torchrec()
    back = KeyedJaggedTensor.from_torchrec(theirs)
    assert (back.keys, back.stride) == (batch.keys, stride)
    for ours in (batch, back):
        assert ours.values.data_ptr() == theirs.values().data_ptr()
        assert ours.lengths.data_ptr() == theirs.lengths().data_ptr()
        assert (ours.weights is None) == (theirs.weights_or_none() is None)
        if ours.weights is not None:
            assert ours.weights.data_ptr() == theirs.weights().data_ptr()
    for key, bags in features.items():
        assert [bag.tolist() for bag in theirs[key].to_dense()] == bags
        assert back[key].to_lists() == bags


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_one_feature_shares_storage_both_ways(weights):
    pytest.importorskip("torchrec")
    from recis.torchrec import jagged_from_torchrec, jagged_to_torchrec

    given_weights = None if weights is None else torch.tensor(weights)
    for values in (torch.tensor([7, 8, 9]), torch.rand(3, 2)):
        ours = JaggedTensor(values, lengths=torch.tensor([2, 0, 1]), weights=given_weights)
        theirs = jagged_to_torchrec(ours)
        back = jagged_from_torchrec(theirs)
        assert values.data_ptr() == theirs.values().data_ptr() == back.values.data_ptr()  # pyright: ignore
        assert ours.lengths.data_ptr() == theirs.lengths().data_ptr() == back.lengths.data_ptr()
        assert [bag.tolist() for bag in theirs.to_dense()] == [values[:2].tolist(), [], values[2:].tolist()]
        assert (back.weights is None) == (weights is None)
        if back.weights is not None:
            assert back.weights.data_ptr() == theirs.weights().data_ptr()


def test_what_ours_cannot_carry_is_refused_by_name():
    pytest.importorskip("torchrec")
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed

    from recis.torchrec import jagged_to_torchrec

    values, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])
    strides = TorchRecKeyed(keys=["a", "b"], values=values, lengths=lengths, stride_per_key_per_rank=[[2], [1]])
    with pytest.raises(ValueError, match="a stride per key, which ours cannot have: pad its features to one B"):
        KeyedJaggedTensor.from_torchrec(strides)
    inverse: Any = (["a"], torch.tensor([[0, 0, 1]]))
    repeated = TorchRecKeyed(keys=["a"], values=values, lengths=lengths, inverse_indices=inverse)
    with pytest.raises(ValueError, match="inverse_indices, which ours cannot have: expand its samples first"):
        KeyedJaggedTensor.from_torchrec(repeated)
    nested = JaggedTensor(JaggedTensor(values, lengths=lengths), lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="TorchRec's JaggedTensor is not nested"):
        jagged_to_torchrec(nested)


def test_without_torchrec_the_way_to_it_is_named():
    """Nothing of recis imports TorchRec by itself; what needs it says how to install it. In a process without it."""
    code = (
        "import sys; sys.modules['torchrec'] = None; sys.modules['fbgemm_gpu'] = None\n"
        "import recis, recis.torchrec\n"
        "from recis import KeyedJaggedTensor\n"
        "def said(use):\n"
        "    try:\n"
        "        use()\n"
        "    except ImportError as error:\n"
        "        return str(error)\n"
        "for name in recis.torchrec.__all__:\n"
        "    print(said(lambda: getattr(recis.torchrec, name)))\n"
        "print(said(KeyedJaggedTensor.from_lists({'a': [[1]]}).to_torchrec))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 11  # ten names, and to_torchrec of a batch
    for line in lines:
        assert 'run `pip install "recis[torchrec]"`, then `pip install --no-deps torchrec==1.8.0`' in line
    assert lines[0].startswith("recis.torchrec.DynamicEmbeddingBagCollection needs TorchRec")


def test_names_of_the_package():
    pytest.importorskip("torchrec")
    import recis.torchrec as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match=r"'recis\.torchrec' has no attribute 'EmbeddingBag'; it has: Dynamic"):
        _ = package.EmbeddingBag
