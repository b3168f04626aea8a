"""Vocabulary tables: every entry found, nothing else, many vocabularies in one call."""

import pytest
import torch

from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.vocab_lookup import id_vocab, lookup_ids, lookup_strings, string_vocab


def _column(texts: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.tensor(list(b"".join(texts)), dtype=torch.uint8)
    return data, lengths_to_offsets(torch.tensor([len(text) for text in texts], dtype=torch.int64))


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_strings(impl):
    vocab = string_vocab(*_column([b"", b"a", b"ab", b"abc", b"\x00"]))
    other = string_vocab(*_column([b"abc"]))
    data, offsets = _column([b"abc", b"abd", b"", b"\x00\x00", b"\x00", b"abc", b"ab"])
    assert lookup_strings(data, offsets, (0, 5, 7), [vocab, other], impl=impl).tolist() == [3, -1, 0, -1, 4, 0, -1]
    assert lookup_strings(data, offsets, (0, 7), [string_vocab(*_column([]))], impl=impl).tolist() == [-1] * 7


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_ids(impl):
    vocab = id_vocab(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    ids = torch.tensor([-1, 1, -(2**63), 2**63 - 1, 0])
    assert lookup_ids(ids, (0, 5), [vocab], impl=impl).tolist() == [1, -1, 3, 2, 0]
    assert lookup_ids(ids, (0, 2, 5), [vocab, id_vocab(ids[:0])], impl=impl).tolist() == [1, -1, -1, -1, -1]


def test_large_vocabularies_on_threads():
    texts = [f"word {number}".encode() for number in range(20_000)]
    data, offsets = _column(texts[::2])
    found = lookup_strings(*_column(texts), (0, len(texts)), [string_vocab(data, offsets)])
    assert found.tolist() == [number // 2 if number % 2 == 0 else -1 for number in range(len(texts))]
    ids = torch.randperm(50_000) * 977
    assert torch.equal(lookup_ids(ids, (0, 50_000), [id_vocab(ids)]), torch.arange(50_000))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_long_strings_that_differ_late_and_probe_far(impl):
    texts = [b"x" * size + bytes([end]) for size in (0, 7, 8, 15, 30, 63, 64, 200) for end in range(40)]
    vocab = string_vocab(*_column(texts[::2]))
    found = lookup_strings(*_column(texts), (0, len(texts)), [vocab], impl=impl)
    assert found.tolist() == [number // 2 if number % 2 == 0 else -1 for number in range(len(texts))]
    ids = torch.randperm(900) * 1024
    vocabs = [id_vocab(ids[:700].clone()), id_vocab(ids[300:].clone())]
    apart = torch.stack((ids, ids), 1)[:, 1]
    found = lookup_ids(apart, (0, 800, 900), vocabs, impl=impl)
    assert found.tolist() == [*range(700), *[-1] * 100, *range(500, 600)]


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_no_values(impl):
    assert lookup_strings(*_column([]), (0, 0), [string_vocab(*_column([b"a"]))], impl=impl).tolist() == []
    assert lookup_ids(torch.zeros(0, dtype=torch.int64), (0,), [], impl=impl).tolist() == []


def launches() -> None:
    data, offsets = _column([b"a", b"abc"])
    vocab, ids = string_vocab(data, offsets), torch.tensor([4, 5])
    for dtype in (torch.int64, torch.int32):
        lookup_strings(data, offsets.to(dtype), (0, 1, 2), [vocab, vocab], impl="triton")
    lookup_ids(ids, (0, 1, 2), [id_vocab(ids), id_vocab(ids)], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_nodes_of_torch_compile(impl):
    data, offsets = _column([b"a", b"abc", b"b"])
    strings, known = string_vocab(data[:4].clone(), offsets[:3].clone()), id_vocab(torch.tensor([7, 9]))
    ids = torch.tensor([9, 8, 7])
    parts = [strings.data], [strings.offsets], [strings.slots]
    torch.library.opcheck(torch.ops.recis.lookup_strings.default, (data, offsets, [0, 3], *parts, impl))
    torch.library.opcheck(torch.ops.recis.lookup_ids.default, (ids, [0, 3], [known.ids], [known.slots], impl))

    def run(data, offsets, ids):
        found = lookup_strings(data, offsets, (0, 3), [strings], impl=impl)
        return found + 10 * lookup_ids(ids, (0, 3), [known], impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(data, offsets, ids).tolist() == [10, -9, -1]


def test_a_vocabulary_on_another_device_is_refused():
    ids = torch.tensor([4, 5])
    with pytest.raises(ValueError, match=r"vocabulary 0 on meta: bring it there once with \.to\(\)"):
        lookup_ids(ids, (0, 2), [id_vocab(ids).to("meta")])
    vocab = string_vocab(*_column([b"a"])).to("meta")
    with pytest.raises(ValueError, match="vocabulary 0 on meta"):
        lookup_strings(*_column([b"a"]), (0, 1), [vocab])


def test_twins_are_refused():
    with pytest.raises(ValueError, match="entries 0 and 2 of the vocabulary are equal"):
        string_vocab(*_column([b"a", b"b", b"a"]))
    with pytest.raises(ValueError, match="entries 1 and 2"):
        id_vocab(torch.tensor([4, 5, 5]))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        lookup_strings(torch.tensor([1]), torch.tensor([0, 1]), (0, 1), [])
    with pytest.raises(ValueError, match="one parameter each"):
        lookup_ids(torch.tensor([1]), (0, 1), [])
