"""FarmHash and MurmurHash: published values at every length branch, numba against Python ints, buckets, columns."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.id_hash import HashKind, hash_ids, hash_strings
from recis_kernels.philox import murmur64a

IMPLS: list[Impl] = ["numba", "triton", "reference"]
KINDS: list[HashKind] = ["farm", "murmur"]
FARM = {  # FarmHash 1.1's C++ (pyfarmhash 0.5.1) on _text(n)
    3: 4237981211716197537,
    7: 9039017176427941284,
    8: 1878791150451284974,
    9: 5539010100875999569,
    16: -8987246039042272059,
    17: -7354860167802194440,
    24: 956894928539892106,
    32: -3046106903570496733,
    33: -5185216656428223796,
    64: -6450833346886370222,
    65: -7034871335152049808,
    127: -7109155291568638137,
    128: 8750054398560823225,
    129: 7635460496707031550,
    200: -5378531133547080687,
    1000: -7994623782243308688,
}
MURMUR = {  # libstdc++'s std::_Hash_bytes with seed 0, which is MurmurHash64A, on _text(n)
    7: -4839194167187885012,
    8: 1731783861876012697,
    9: 4345537020346382593,
    15: -1462194409953498250,
    16: 4780213276303642387,
    17: -3569061288811134003,
    24: -7292863543811625856,
    32: -4516108143572223022,
    33: -965425552505391008,
    64: -8146335962185101601,
    65: 130015109212554516,
    1000: -5550310962563197360,
}


def _text(size: int) -> bytes:
    return bytes(33 + (i * 7 + size) % 90 for i in range(size))


def _hash(
    texts: list[bytes], kind: HashKind = "farm", num_buckets: int | None = None, impl: Impl = "auto"
) -> list[int]:
    data = torch.tensor(list(b"".join(texts)), dtype=torch.uint8)
    offsets = torch.tensor([0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()])
    return hash_strings(data, offsets, (0, len(texts)), [kind], [num_buckets], impl=impl).tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_conformance_values(impl):
    rows = [bytes([0, 1, 2]), bytes([1, 2, 3]), bytes([0, 5, 5]), bytes([5, 6, 7])]
    assert _hash(rows, impl=impl) == [  # A1
        -7736835464683084646,
        -5546720800891377920,
        -4442022684725028445,
        -909183002746659612,
    ]
    assert _hash(rows, "murmur", impl=impl) == [  # A2
        -4003751876240412087,
        -1042754718167355375,
        -5541886947548579749,
        4434088491466393040,
    ]
    words = [b"abc", b"hello", b"user_1", b"12345678", b""]
    assert _hash(words, impl=impl) == [  # A3
        2640714258260161385,
        -5436999610281751320,
        1009713755322965798,
        3430003927990384362,
        -7286425919675154353,
    ]
    assert _hash(words, "murmur", impl=impl) == [  # A4
        -7148968302806999301,
        2191231550387646743,
        4655867453049496070,
        8471103573108904450,
        0,
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_buckets(impl):  # A5
    hello = [_hash([b"hello"], "farm", n, impl)[0] for n in (None, 0, 1000)]
    assert hello == [-5436999610281751320, 3786372426573024488, 296]
    assert [_hash([b"abc"], "murmur", n, impl)[0] for n in (0, 1000)] == [2074403734047776507, 315]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kind", "answers"), [("farm", FARM), ("murmur", MURMUR)], ids=KINDS)
def test_published_answers_of_every_length_branch(kind, answers, impl):
    hashes = _hash([_text(size) for size in answers], kind, impl=impl)
    assert dict(zip(answers, hashes, strict=True)) == answers


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_matches_the_reference(kind, impl):
    torch.manual_seed(2)
    texts = [bytes(torch.randint(0, 256, (size,)).tolist()) for size in range(200)]
    hashes = _hash(texts, kind, impl=impl)
    assert hashes == _hash(texts, kind, impl="reference")
    if kind == "murmur":
        assert [bits % 2**64 for bits in hashes] == [murmur64a(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_buckets", [None, 0, 1, 7, 1 << 40, (1 << 63) - 1])
def test_ids_hash_as_eight_bytes(kind, num_buckets):
    ids = torch.cat([torch.tensor([0, 1, -1, -(2**63), 2**63 - 1]), torch.randint(-(2**62), 2**62, (40,))])
    texts = [value.to_bytes(8, "little", signed=True) for value in ids.tolist()]
    want = _hash(texts, kind, num_buckets, "reference")
    for impl in IMPLS:
        assert hash_ids(ids, (0, ids.numel()), [kind], [num_buckets], impl=impl).tolist() == want


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_many_columns_in_one_call_and_on_many_threads(impl):
    torch.manual_seed(3)
    size = 30000 if impl == "numba" else 700  # the interpreter runs one program after another
    columns = (0, 0, size // 3 - 1, size // 3, size)
    kinds, buckets = KINDS * 2, [5, None, 0, 1000]
    lengths = torch.randint(0, 20, (size,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    data = torch.randint(0, 256, (int(offsets[-1]),), dtype=torch.uint8)
    ids = torch.randint(-(2**62), 2**62, (size,))
    strings = hash_strings(data, offsets, columns, kinds, buckets, impl=impl)
    numbers = hash_ids(ids, columns, kinds, buckets, impl=impl)
    for column in range(4):
        start, stop = columns[column], columns[column + 1]
        part = offsets[start : stop + 1]
        one = hash_strings(
            data[part[0] : part[-1]], part - part[0], (0, stop - start), [kinds[column]], [buckets[column]]
        )
        assert torch.equal(strings[start:stop], one)
        one = hash_ids(ids[start:stop], (0, stop - start), [kinds[column]], [buckets[column]])
        assert torch.equal(numbers[start:stop], one)


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_offsets_and_slices(impl):
    want = [2640714258260161385, -5436999610281751320]
    data = torch.tensor(list(b"xabchello"), dtype=torch.uint8)[1:]
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert hash_strings(data, offsets, (0, 2), ["farm"], [None], impl=impl).tolist() == want
    apart = torch.stack((data, data + 1), 1)[:, 0]
    spread = torch.stack((offsets, offsets * 0 - 9), 1)[:, 0]
    assert hash_strings(apart, spread, (0, 2), ["farm"], [None], impl=impl).tolist() == want
    ids = torch.arange(12).view(6, 2)
    even = hash_ids(ids[:, 0], (0, 6), ["murmur"], [None], impl=impl)
    assert even.tolist() == hash_ids(ids[:, 0].contiguous(), (0, 6), ["murmur"], [None], impl="reference").tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_hash(impl):
    no_bytes, none = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    assert hash_strings(no_bytes, torch.tensor([0]), (0, 0), ["farm"], [3], impl=impl).tolist() == []
    assert hash_strings(no_bytes, torch.tensor([0]), (0,), [], [], impl=impl).tolist() == []
    assert hash_ids(none, (0, 0, 0), ["farm", "murmur"], [3, 0], impl=impl).tolist() == []


def launches() -> None:
    data, ids = torch.zeros(300, dtype=torch.uint8), torch.arange(6)
    for dtype in (torch.int64, torch.int32):
        offsets = torch.tensor([0, 3, 20, 100, 300], dtype=dtype)
        hash_strings(data, offsets, (0, 2, 4), KINDS, [None, 7], impl="triton")
    hash_ids(ids, (0, 2, 6), KINDS, [None, 7], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_nodes_of_torch_compile(impl):
    data, offsets = torch.arange(97, dtype=torch.uint8), torch.tensor([0, 3, 20, 97])
    ids = torch.tensor([5, -1, 7])
    torch.library.opcheck(torch.ops.recis.hash_strings.default, (data, offsets, [0, 1, 3], [0, 1], [-1, 7], impl))
    torch.library.opcheck(torch.ops.recis.hash_ids.default, (ids, [0, 1, 3], [0, 1], [-1, 7], impl))

    def both(data, offsets, ids):
        strings = hash_strings(data, offsets, (0, 1, 3), KINDS, [None, 7], impl=impl)
        return strings + hash_ids(ids, (0, 1, 3), KINDS, [0, 7], impl=impl)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data, offsets, ids), both(data, offsets, ids))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kinds": ["sha"]}, "hash kind must be one of"),
        ({"num_buckets": [-1]}, r"in \[0, 2\*\*63\)"),
        ({"num_buckets": []}, "one parameter each"),
        ({"column_offsets": (0, 2)}, "from 0 to 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change, text):
    arguments = {"column_offsets": (0, 1), "kinds": ["farm"], "num_buckets": [None]} | change
    with pytest.raises(ValueError, match=text):
        hash_ids(torch.tensor([1]), **arguments)
    with pytest.raises(ValueError, match=text):
        hash_strings(torch.tensor([1], dtype=torch.uint8), torch.tensor([0, 1]), **arguments)


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        hash_strings(torch.tensor([1]), torch.tensor([0, 1]), (0, 1), ["farm"], [None])
    with pytest.raises(ValueError, match="int64"):
        hash_ids(torch.tensor([1.0]), (0, 1), ["farm"], [None])
