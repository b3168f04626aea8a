"""Tokens and where they came from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.tagger.text import _TOKEN, TOKENIZERS, WORDS, from_words, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Apple iPhone 8 Plus 64GB", ("apple", "iphone", "8", "plus", "64", "gb")),
        ("Ballet Flat,Nautical Navy,4 M", ("ballet", "flat", ",", "nautical", "navy", ",", "4", "m")),
        ("1,000 pcs (new)", ("1,000", "pcs", "(", "new", ")")),
        ("3.5mm jack s10gb", ("3.5", "mm", "jack", "s10gb")),
        ("１６ＧＢ Straße", ("16", "gb", "strasse")),
        ("Cafe\u0301", ("café",)),
        ('55" tv', ("55", '"', "tv")),
        ("", ()),
        (" \t\u00a0\n", ()),
    ],
)
def test_tokens(text, tokens):
    assert tokenize(text).tokens == tokens


def test_words_are_split_on_white_space_only():
    assert tokenize("64GB, red", WORDS).tokens == ("64gb,", "red")
    assert from_words(["64GB,", "Red"]).tokens == ("64gb,", "red")


def test_offsets_count_characters_of_the_given_text():
    text = tokenize("Größe ﬁne １６ＧＢ")
    assert [text.text[a:b] for a, b in zip(text.starts, text.ends, strict=True)] == ["Größe", "ﬁne", "１６", "ＧＢ"]
    assert text.tokens == ("grösse", "fine", "16", "gb")


@given(st.text(max_size=60))
def test_tokens_lie_in_order_and_hold_no_white_space(value):
    text = tokenize(value)
    assert list(text.starts) == sorted(text.starts)
    assert list(text.ends) == sorted(text.ends)
    for token, start, end in zip(text.tokens, text.starts, text.ends, strict=True):
        assert 0 <= start < end <= len(value)
        assert token
        assert not any(char.isspace() for char in token)


@given(st.text(st.characters(codec="ascii"), max_size=60))
def test_ascii_tokens_are_the_lowered_characters_between_their_offsets(value):
    text = tokenize(value)
    assert [value[a:b].lower() for a, b in zip(text.starts, text.ends, strict=True)] == list(text.tokens)
    assert "".join(text.tokens) == "".join(value.lower().split())


@given(st.text(st.sampled_from('ab19 \t\n.,;()"gGbBxX'), max_size=30), st.sampled_from(TOKENIZERS))
def test_words_looked_at_one_by_one_give_what_the_whole_text_gives(value, tokenizer):
    text = tokenize(value, tokenizer)
    whole = value.lower().split() if tokenizer == WORDS else _TOKEN.findall(value.lower())
    assert text.tokens == tuple(whole)
    ends = [0, *text.ends]
    assert all(value[a:b].strip() == "" for a, b in zip(ends, text.starts, strict=False))  # nothing lies between tokens


@given(
    st.lists(st.text(st.characters(codec="ascii", exclude_categories=("Z", "C")), min_size=1, max_size=8), max_size=6)
)
def test_given_words_stay_whole(words):
    text = from_words(words)
    assert text.tokens == tuple(word.lower() for word in words)
    assert [text.text[a:b] for a, b in zip(text.starts, text.ends, strict=True)] == words


@pytest.mark.parametrize("words", [["a b"], [""], ["a", "\t"]])
def test_a_word_with_white_space_is_refused(words):
    with pytest.raises(ValueError, match="must be text without white space"):
        from_words(words)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer 'x' is not known; there are recis-tok-1, recis-words-1"):
        tokenize("a", "x")
