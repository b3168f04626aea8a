"""Tokens to steps: by hand, any cut of the bytes, padding and eos, the fall-back decoders."""

import pytest
import torch
from graded_pairs import COMPACT, answer, read
from hypothesis import given, settings
from hypothesis import strategies as st

from relevance.grammar import parse
from relevance.labels import PROFILES
from relevance.steps import byte_level_bytes, incremental_bytes, step_ids

GOOD = answer(4, attributes={"colour": "ok"})


def test_by_hand():
    pieces = [
        "4",
        "<category>",
        "match",
        "</category>",
        "<attribute>colour=x:ok</attribute><ru",
        "le>E01</rule>",
        "<verdict>4</verdict>",
    ]
    assert "".join(pieces) == GOOD
    tokens = [*(piece.encode() for piece in pieces), b"", None, None]
    # the straddling token belongs to the block of its first byte, the eos to the last block
    assert step_ids(tokens, read(GOOD), COMPACT).tolist() == [0, 1, 1, 1, 2, 3, 4, 4, -1, -1]
    assert step_ids(tokens, read(GOOD), COMPACT).dtype == torch.int64


def test_a_label_that_shares_its_token_with_a_tag():
    tokens = [GOOD[:5].encode(), GOOD[5:].encode()]
    assert step_ids(tokens, read(GOOD), COMPACT).tolist() == [0, 1]


def test_faulty_text_is_one_step():
    tokens = [b"4", b"<category>", b"match", b"", None]
    assert step_ids(tokens, read("4<category>match"), COMPACT).tolist() == [0, 0, 0, 0, -1]
    assert step_ids([], read(""), COMPACT).tolist() == []
    assert step_ids([None], read(""), COMPACT).tolist() == [-1]


def test_label_only():
    profile = PROFILES["label_only"]
    assert step_ids([b"4", b"", None], parse("4", profile), profile).tolist() == [0, 0, -1]


def test_the_tokens_must_spell_the_text():
    with pytest.raises(ValueError, match=r"the tokens spell 1 characters, the completion that was parsed has \d+"):
        step_ids([b"4"], read(GOOD), COMPACT)
    with pytest.raises(ValueError, match="'think_first' has its label at the end"):
        step_ids([b"4"], read(GOOD), PROFILES["think_first"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_steps_partition_any_cut_of_the_bytes(data):
    text = data.draw(
        st.text(st.characters(blacklist_characters="<>\ufffd", blacklist_categories=["Cs"]), min_size=1, max_size=20)
    )
    profile = PROFILES["dyknow"]
    completion = f"3<context>adopt: {text}</context><why>{text}</why><verdict>3</verdict>"
    parsed = parse(completion, profile)
    assert parsed.ok
    raw = completion.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    tokens = [raw[lo:hi] for lo, hi in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    got = step_ids([*tokens, b"", None], parsed, profile).tolist()
    assert got[-1] == -1
    assert got[-2] == 3
    assert got[:-1] == sorted(got[:-1])  # in order, each token in exactly one step
    # the same by counting: bytes of the text before each block
    starts = [len(completion[: parsed.spans[tag][0]].encode()) for tag in profile.tags]
    at = 0
    for token, step in zip(tokens, got, strict=False):
        if token:
            assert step == sum(start <= at for start in starts)
        at += len(token)


def test_byte_level_alphabet():
    assert byte_level_bytes("Ġmatch") == b" match"
    assert byte_level_bytes("Ċ") == b"\n"
    assert byte_level_bytes("Ã©") == "é".encode()
    with pytest.raises(ValueError, match="stands for no byte"):
        byte_level_bytes("日")


def test_incremental_decoding():
    raw = [b"4", "é".encode()[:1], "é".encode()[1:], b"x"]
    pieces = incremental_bytes(lambda ids: b"".join(raw[i] for i in ids).decode("utf-8", "replace"), [0, 1, 2, 3])
    assert pieces == [b"4", b"", "é".encode(), b"x"]
