"""Words and hashes against published known answers, and the loops against the tensor forms."""

import numpy as np
import pytest
import torch

from recis_kernels import philox, philox_triton
from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.philox_vector import COLUMNS, store_words

EDGE_IDS = torch.tensor([0, 1, -1, 42, 2**63 - 1, -(2**63), 2**32, -(2**32) - 5])


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_the_philox_paper(counter, key, want):
    numbers = [int(word, 16) for word in want.split()]
    assert philox.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == numbers
    one = philox.philox_one(*(np.uint64(word) for word in counter), *(np.uint64(word) for word in key))
    assert [int(word) for word in one] == numbers


def test_table_keys():
    assert philox.table_key(7, "item") % 2**64 == 0xFBCD7EEE124B4537
    assert philox.table_key(7, "user") % 2**64 == 0x72D6D1A7D1DD2969
    assert philox.table_key(8, "item") != philox.table_key(7, "item")
    assert philox.table_key(-1, "größe") == philox.table_key(2**64 - 1, "größe")
    assert -(2**63) <= philox.table_key(0, "") < 2**63


def test_words_of_an_id():
    keys = torch.tensor([philox.table_key(7, "item")])
    got = philox.words(torch.tensor([42]), 8, keys, 0)
    assert [f"{word:08x}" for word in got[0].tolist()] == (
        ["f8b7526e", "4a5fb737", "80c12011", "1baab475", "d6b4326c", "ec143678", "8a063f39", "2a8a552f"]
    )


@pytest.mark.parametrize("stream", [0, 3, 2**30 + 17, 2**32 - 1])
def test_loops_draw_the_same_words(stream):
    key = philox.table_key(-5, "t")
    want = philox.words(EDGE_IDS, COLUMNS + 5, torch.tensor([key]), stream)
    out = np.zeros(COLUMNS, np.uint32)
    for n, row_id in enumerate(EDGE_IDS.tolist()):
        quads = [philox.id_words(key, row_id, quad, stream) for quad in range((COLUMNS + 5 + 3) // 4)]
        assert [int(word) for quad in quads for word in quad][: COLUMNS + 5] == want[n].tolist()
        _store(key, row_id, stream, out)
        assert out.tolist() == want[n, :COLUMNS].tolist()


@philox.njit
def _store(key, row_id, stream, out):
    store_words(key, row_id, 0, stream, np.int64(out.ctypes.data))


@jit
def _words_kernel(ids_ptr, keys_ptr, hashes_ptr, words_ptr, bits_ptr, num_ids, stream, BLOCK: tl.constexpr):
    """Write hash64, eight words and the bf16 bits of the id's low half as a float of each id."""
    place = tl.arange(0, BLOCK)
    mask = place < num_ids
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    tl.store(hashes_ptr + place, philox_triton.hash64(ids).to(tl.int64, bitcast=True), mask=mask)
    tl.store(bits_ptr + place, philox_triton.bf16_bits(ids.to(tl.int32).to(tl.float32, bitcast=True)), mask=mask)
    keys = tl.load(keys_ptr + place, mask=mask, other=0)
    quads = tl.arange(0, 2)
    drawn = philox_triton.id_words(keys[:, None], ids[:, None], quads[None, :], stream)
    for word in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        at = words_ptr + place[:, None] * 8 + 4 * quads[None, :] + word
        tl.store(at, drawn[word].to(tl.int64), mask=mask[:, None])


def _kernel_words(ids: torch.Tensor, keys: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
    hashes, drawn = torch.empty_like(ids), torch.empty(ids.numel(), 8, dtype=torch.int64)
    bits = torch.empty(ids.shape, dtype=torch.uint16)
    launch(_words_kernel, (1,), ids, keys, hashes, drawn, bits, ids.numel(), stream, BLOCK=16)
    return hashes, drawn, bits


def launches() -> None:
    """Launch the functions that kernels call, for compile_kernels.py."""
    _kernel_words(EDGE_IDS, EDGE_IDS, 3)
    _kernel_words(EDGE_IDS, EDGE_IDS, 2**31 + 3)


@pytest.mark.parametrize("stream", [0, 3, 2**30 + 17, 2**31, 2**32 - 1])
def test_kernels_hash_and_draw_the_same(stream):
    keys = torch.tensor([philox.table_key(seed, "t") for seed in range(EDGE_IDS.numel())])
    hashes, drawn, _ = _kernel_words(EDGE_IDS, keys, stream)
    assert hashes.equal(philox.hash64(EDGE_IDS))
    assert drawn.equal(philox.words(EDGE_IDS, 8, keys, stream))


def test_kernels_round_to_bf16_like_torch():
    floats = torch.tensor([1.0, 1.00390625, 1.01171875, -1.0039062, 3.3895e38, torch.inf, -torch.inf, 1e-40, -0.0])
    bits = _kernel_words(floats.view(torch.int32).long(), floats.view(torch.int32).long(), 0)[2]
    assert bits.view(torch.bfloat16).equal(floats.to(torch.bfloat16))


def test_keys_per_id_and_columns_past_the_first_vector():
    keys = torch.tensor([philox.table_key(1, "a"), philox.table_key(1, "b")])
    both = philox.words(torch.tensor([9, 9]), 3, keys, 0)
    for n in range(2):
        assert both[n].equal(philox.words(torch.tensor([9]), 3, keys[n : n + 1], 0)[0])
    assert not both[0].equal(both[1])
    assert philox.words(torch.tensor([], dtype=torch.int64), 3, keys[:1], 0).shape == (0, 3)


def test_hash64():
    ids = torch.tensor([0, 1, -1, -(2**63)])
    want = [0, 0xB456BCFC34C2CB2C, 0x64B5720B4B825F21, 0x8F780810AF31A493]
    assert [bits % 2**64 for bits in philox.hash64(ids).tolist()] == want
    assert [int(philox.hash64_one(row_id)) for row_id in ids.tolist()] == want
    assert [philox.hash64_of(row_id) for row_id in ids.tolist()] == want
    assert philox.hash64_of(2**64 - 1) == want[2]
    many = torch.randint(-(2**63), 2**63 - 1, (100,))
    assert [int(philox.hash64_one(row_id)) for row_id in many.tolist()] == [
        bits % 2**64 for bits in philox.hash64(many).tolist()
    ]
    with pytest.raises(ValueError, match=r"ids must be int64; got torch\.int32"):
        philox.hash64(ids.int())


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"\x00\x01\x02", -4003751876240412087),
        (b"\x05\x06\x07", 4434088491466393040),
        (b"abc", -7148968302806999301),
        (b"hello", 2191231550387646743),
        (b"12345678", 8471103573108904450),
        (b"", 0),
    ],
)
def test_murmur64a(data, want):
    assert philox.to_signed(philox.murmur64a(data)) == want


def test_streams_do_not_meet():
    assert philox.admission_stream(0) == 2**30
    assert philox.admission_stream(2**30 + 5) == 2**30 + 5
    assert philox.rounding_stream(0) == 2**31
    assert philox.rounding_stream(2**31 + 5) == 2**31 + 5
    assert max(philox.admission_stream(step) for step in (0, 2**30 - 1, 2**40 - 1)) < 2**31
    assert max(philox.rounding_stream(step) for step in (0, 2**31 - 1, 2**40 - 1)) < 2**32
