"""Jagged tensors: layout, views, nesting, strings, padding, validation, and TorchRec without a copy."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.jagged import JaggedTensor, KeyedJaggedTensor, ragged_take
from recis_kernels import checks


def _ids(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def test_lengths_and_offsets_derive_each_other():
    from_lengths = JaggedTensor(_ids(5, 6, 7), lengths=_ids(2, 0, 1))
    from_offsets = JaggedTensor(_ids(5, 6, 7), offsets=_ids(0, 2, 2, 3))
    assert from_lengths.offsets.tolist() == [0, 2, 2, 3]
    assert from_offsets.lengths.tolist() == [2, 0, 1]
    assert from_lengths.num_bags == from_offsets.num_bags == 3
    assert from_lengths.to_lists() == from_offsets.to_lists() == [[5, 6], [], [7]]


def test_int32_offsets_stay_int32():
    bags = JaggedTensor(_ids(5, 6, 7), lengths=torch.tensor([1, 2], dtype=torch.int32))
    assert bags.offsets.dtype == torch.int32
    assert bags.offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "give lengths"),
        ({"offsets": [1, 3]}, "offsets must start at 0; they start at 1"),
        ({"offsets": [0, 4]}, "offsets end at 4, but there are 3 values"),
        ({"offsets": []}, "offsets"),
        ({"offsets": [0.0, 3.0]}, "int64 or int32"),
        ({"lengths": [1, 2], "offsets": [0, 3]}, "2 lengths need 3 offsets"),
        ({"offsets": [0, 3], "weights": [1.0]}, "one per entry"),
        ({"offsets": [0, 3], "weights": [1, 2, 3]}, "floating point"),
    ],
    ids=str,
)
def test_malformed_bags_are_refused(fields, text):
    tensors = {name: torch.tensor(field) for name, field in fields.items()}
    with pytest.raises(ValueError, match=text):
        JaggedTensor(_ids(1, 2, 3), **tensors)
    with pytest.raises(ValueError, match=text):
        KeyedJaggedTensor(["a"], _ids(1, 2, 3), stride=None, **tensors)


def test_wrong_lengths_are_refused_when_they_are_first_summed():
    with pytest.raises(ValueError, match="offsets end at 5"):
        _ = JaggedTensor(_ids(1, 2), lengths=_ids(5)).offsets
    with pytest.raises(ValueError, match="offsets end at 1"):
        _ = KeyedJaggedTensor(["a"], _ids(1, 2), lengths=_ids(1)).offsets


def test_checks_find_what_lies_between_the_ends():
    with checks(), pytest.raises(ValueError, match="bag 1 is"):
        JaggedTensor(_ids(1, 2, 3), offsets=_ids(0, 3, 2, 3))
    with checks(), pytest.raises(ValueError, match="bag 0 has -1"):
        JaggedTensor(_ids(1, 2, 3), lengths=_ids(-1, 4))
    with checks(), pytest.raises(ValueError, match="disagree"):
        JaggedTensor(_ids(1, 2, 3), lengths=_ids(1, 2), offsets=_ids(0, 2, 3))


def test_objects_are_immutable_and_pickle():
    bags = JaggedTensor.from_lists([[1], [2, 3]], weights=[[0.5], [1.0, 2.0]])
    batch = KeyedJaggedTensor.from_jagged({"a": bags})
    for thing in (bags, batch):
        with pytest.raises(AttributeError, match="immutable"):
            thing.values = _ids(1)
    assert pickle.loads(pickle.dumps(bags)).to_lists() == bags.to_lists()
    again = pickle.loads(pickle.dumps(batch))
    assert (again.keys, again.stride, again.weights.tolist()) == (("a",), 2, [0.5, 1.0, 2.0])


def test_nested_lists_outermost_level_first():
    nested = JaggedTensor.from_lists([[[1, 2], [3]], [], [[4]]])
    assert nested.is_nested
    assert nested.offsets.tolist() == [0, 2, 2, 3]
    assert nested.inner.offsets.tolist() == [0, 2, 3, 4]
    assert nested.flat_values.tolist() == [1, 2, 3, 4]
    assert nested.to_lists() == [[[1, 2], [3]], [], [[4]]]
    with pytest.raises(ValueError, match="nested"):
        nested.to_padded()


def test_strings_are_bytes():
    column = JaggedTensor.from_strings(["abc", "", "é", b"\x00\xff"])
    assert column.is_strings
    assert column.flat_values.dtype == torch.uint8
    assert column.offsets.tolist() == [0, 3, 3, 5, 7]
    assert column.to_strings() == [b"abc", b"", "é".encode(), b"\x00\xff"]
    lists = JaggedTensor.from_lists([["a", "bc"], [], ["d"]])
    assert lists.lengths.tolist() == [2, 0, 1]
    assert lists.inner.to_strings() == [b"a", b"bc", b"d"]
    with pytest.raises(ValueError, match="uint8"):
        lists.to_strings()


def test_padding_both_ways():
    bags = JaggedTensor.from_lists([[1, 2, 3], [], [4]])
    assert bags.to_padded().tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert bags.to_padded(max_length=2, fill=-1).tolist() == [[1, 2], [-1, -1], [4, -1]]
    padded = torch.tensor([[1, 0, 3, 0, 0], [6, 7, 8, 0, 0]])
    trimmed = JaggedTensor.from_padded(padded, invalid=0)  # A13: only the tail goes
    assert trimmed.flat_values.tolist() == [1, 0, 3, 6, 7, 8]
    assert trimmed.offsets.tolist() == [0, 3, 6]
    whole = JaggedTensor.from_padded(padded)  # A14
    assert whole.flat_values.tolist() == padded.flatten().tolist()
    assert whole.offsets.tolist() == [0, 5, 10]


def test_padding_vectors_and_their_gradient():
    vectors = torch.arange(8.0).view(4, 2).requires_grad_()
    bags = JaggedTensor(vectors, lengths=_ids(3, 0, 1))
    padded = bags.to_padded(max_length=2)
    assert padded.shape == (3, 2, 2)
    padded.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.tolist() == [[1, 1], [1, 1], [0, 0], [1, 1]]  # the cut third vector gets none


@pytest.mark.parametrize("rows", [[], [[], []]], ids=str)
def test_empty_batches_keep_their_size(rows):
    bags = JaggedTensor.from_lists(rows)
    assert bags.num_bags == len(rows)
    assert bags.to_lists() == rows
    assert bags.to_padded().shape == (len(rows), 0)
    assert JaggedTensor.from_padded(torch.zeros(len(rows), 3), invalid=0).num_bags == len(rows)


def test_keyed_layout_and_views():
    batch = KeyedJaggedTensor(["a", "b"], _ids(1, 2, 3, 4, 5), lengths=_ids(1, 0, 2, 2), weights=torch.arange(5.0))
    assert batch.stride == 2
    assert batch.offset_per_key == (0, 1, 5)
    assert batch.key_offsets.tolist() == [0, 1, 5]
    b = batch["b"]
    assert b.to_lists() == [[2, 3], [4, 5]]
    assert b.offsets.tolist() == [0, 2, 4]
    assert b.flat_values.data_ptr() == batch.values[1:].data_ptr()
    assert b.weights is not None
    assert b.weights.tolist() == [1, 2, 3, 4]
    with pytest.raises(KeyError, match="no feature 'c'"):
        batch["c"]


def test_keyed_from_offsets_only_gives_offsets_from_zero():
    batch = KeyedJaggedTensor(["a", "b"], _ids(1, 2, 3), offsets=_ids(0, 1, 1, 2, 3))
    assert batch["b"].offsets.tolist() == [0, 1, 2]
    assert [part.lengths.tolist() for part in batch.split([1, 1])] == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("keys", "stride", "text"),
    [
        (["a", "a"], None, "repeat"),
        (["a", ""], None, "non-empty"),
        (["a", "b"], 3, "need 6 bags; got 4"),
        (["a", "b", "c"], None, "need 3 bags; got 4"),
        ([], None, "give stride"),
    ],
    ids=str,
)
def test_keys_and_stride_must_fit(keys, stride, text):
    with pytest.raises(ValueError, match=text):
        KeyedJaggedTensor(keys, _ids(1), lengths=_ids(1, 0, 0, 0), stride=stride)


def test_no_feature_and_no_sample_keep_their_shape():
    no_feature = KeyedJaggedTensor([], _ids(), lengths=_ids(), stride=3)
    assert (no_feature.stride, no_feature.to_dict(), no_feature.offset_per_key) == (3, {}, (0,))
    no_sample = KeyedJaggedTensor(["a", "b"], _ids(), lengths=_ids(), stride=0)
    assert no_sample["b"].num_bags == 0
    assert no_sample.offset_per_key == (0, 0, 0)
    empty_bags = KeyedJaggedTensor(["a"], _ids(), lengths=_ids(0, 0, 0))
    assert empty_bags["a"].to_lists() == [[], [], []]


def test_split_permute_concat():
    batch = KeyedJaggedTensor.from_lists(
        {"a": [[1], [2]], "b": [[], [3, 4]], "c": [[5, 6], []]}, weights={"c": [[0.5, 0.25], []]}
    )
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 1, 1, 0.5, 0.25]  # a feature without weights counts as ones
    first, none, rest = batch.split([1, 0, 2])
    assert (first.keys, none.keys, rest.keys) == (("a",), (), ("b", "c"))
    assert none.stride == 2
    assert rest["c"].to_lists() == [[5, 6], []]
    turned = batch.permute([2, 0])
    assert turned.keys == ("c", "a")
    assert turned.values.tolist() == [5, 6, 1, 2]
    assert turned.weights is not None
    assert turned.weights.tolist() == [0.5, 0.25, 1, 1]
    again = KeyedJaggedTensor.concat([first, rest])
    assert torch.equal(again.values, batch.values)
    assert torch.equal(again.lengths, batch.lengths)
    assert batch.permute([]).stride == 2
    for wrong in ([0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="distinct indices"):
            batch.permute(wrong)
    with pytest.raises(ValueError, match="add up to 3"):
        batch.split([1, 1])
    with pytest.raises(ValueError, match="strides"):
        KeyedJaggedTensor.concat([first, KeyedJaggedTensor.from_lists({"z": [[1]]})])


def test_ragged_take_maps_picks_back():
    # rows of 4, 3, 3 entries cut to their last 2: 2, 1, 1 dropped at the head
    offsets, dropped = _ids(0, 4, 7, 10), _ids(2, 1, 1)
    taken = ragged_take(offsets, dropped, torch.tensor([[1, 0], [0, 2], [1, -1]]))
    assert taken.to_lists() == [[3, 2], [5], [9]]  # pick 2 lies past row 1's end, -1 is padding
    jagged = ragged_take(offsets, dropped, JaggedTensor.from_lists([[0], [], [1, 1]]))
    assert jagged.to_lists() == [[2], [], [9, 9]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_matches_dicts_of_lists(data):
    stride = data.draw(st.integers(0, 4))
    rows = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3), min_size=stride, max_size=stride)
    model = {f"f{i}": data.draw(rows) for i in range(data.draw(st.integers(0, 4)))}
    batch = KeyedJaggedTensor.from_lists(model, stride=stride)
    for step in data.draw(st.lists(st.sampled_from(["permute", "split", "concat", "rebuild", "pickle"]), max_size=6)):
        keys = list(model)
        if step == "permute":
            order = data.draw(st.permutations(range(len(keys))))[: data.draw(st.integers(0, len(keys)))]
            batch, model = batch.permute(order), {keys[i]: model[keys[i]] for i in order}
        elif step == "split":
            cut = data.draw(st.integers(0, len(keys)))
            batch, model = batch.split([cut, len(keys) - cut])[1], {key: model[key] for key in keys[cut:]}
        elif step == "concat":
            name, extra = f"c{len(keys)}{'_'.join(keys)}", data.draw(rows)
            batch = KeyedJaggedTensor.concat([batch, KeyedJaggedTensor.from_lists({name: extra}, stride=stride)])
            model = model | {name: extra}
        elif step == "rebuild":
            batch = KeyedJaggedTensor.from_jagged(batch.to_dict(), stride=stride)
        else:
            batch = pickle.loads(pickle.dumps(batch))
        assert {key: feature.to_lists() for key, feature in batch.to_dict().items()} == model
        assert (batch.keys, batch.stride) == (tuple(model), stride)
        with checks():
            KeyedJaggedTensor(batch.keys, batch.values, batch.lengths, batch.offsets, stride=stride)


@pytest.mark.torchrec
def test_torchrec_shares_storage_both_ways():
    pytest.importorskip("torchrec")
    batch = KeyedJaggedTensor.from_lists({"a": [[1], [2]], "b": [[], [3, 4]]}, weights={"b": [[], [0.5, 2.0]]})
    theirs = batch.to_torchrec()
    assert theirs.keys() == ["a", "b"]
    assert theirs["b"].values().tolist() == [3, 4]
    back = KeyedJaggedTensor.from_torchrec(theirs)
    assert back.stride == theirs.stride() == 2
    for ours in (batch, back):
        assert ours.values.data_ptr() == theirs.values().data_ptr()
        assert ours.lengths.data_ptr() == theirs.lengths().data_ptr()
        assert ours.weights is not None
        assert ours.weights.data_ptr() == theirs.weights().data_ptr()


@pytest.mark.torchrec
@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=["F0", "empty bags"])
def test_torchrec_edges_keep_stride(lengths):
    pytest.importorskip("torchrec")
    keys = ["a"] if lengths else []
    batch = KeyedJaggedTensor(keys, _ids(), lengths=_ids(*lengths), stride=3)
    back = KeyedJaggedTensor.from_torchrec(batch.to_torchrec())
    assert (back.keys, back.stride) == (tuple(keys), 3)
