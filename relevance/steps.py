"""Which reasoning step each sampled token belongs to, found from the bytes of the tokens.

    tokens   "3" "<category>" "near" "</category>" "<attribute>" ..  eos  pad
    step ids  0   1            1      1             2                K-1   -1

Step 0 is the label, step k the k-th block of the profile with its tags; a token that straddles two blocks goes to that of
its first byte. The bytes are those of the sampled ids: encoding the text again may give other tokens. The rule is ours.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from relevance.labels import Parsed, Profile

PADDING = -1


def step_ids(token_bytes: Sequence[bytes | None], parsed: Parsed, profile: Profile) -> Tensor:
    """Return the step of each token, int64 [C].

    Args:
        token_bytes: per token the bytes it adds to the text; b"" for the eos and other special tokens, None for padding.
        parsed: the completion that these tokens spell.
        profile: the profile that it was parsed with.

    Returns:
        0 to K - 1, the eos in the last step, -1 for padding. Where `parsed.ok` is False all tokens are step 0, K = 1.

    Raises:
        ValueError: the label comes last in this profile, or the bytes are not those of the text that was parsed.
    """
    if profile.is_label_last:
        raise ValueError(f"profile {profile.name!r} has its label at the end: it has no steps to train")
    is_padding = np.array([piece is None for piece in token_bytes], dtype=bool)
    if not parsed.ok:
        return torch.from_numpy(np.where(is_padding, PADDING, 0))
    pieces = [piece or b"" for piece in token_bytes]
    text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    starts = np.array([parsed.spans[tag][0] for tag in profile.tags], dtype=np.int64)
    end = parsed.spans[profile.tags[-1]][1] if profile.tags else 1
    # a character begins at every byte that does not continue one; a text without faults is valid UTF-8
    char_of_byte = np.cumsum((text & 0xC0) != 0x80) - 1
    num_chars = int(char_of_byte[-1]) + 1 if text.size else 0
    if num_chars != end:
        raise ValueError(f"the tokens spell {num_chars} characters, the completion that was parsed has {end}")
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    first_byte = np.cumsum(lengths) - lengths
    first_char = char_of_byte[np.minimum(first_byte, text.size - 1)]
    step = np.searchsorted(starts, first_char, side="right")  # 0 before the first block: the label
    step = np.where(first_byte >= text.size, profile.num_steps - 1, step)
    return torch.from_numpy(np.where(is_padding, PADDING, step).astype(np.int64))


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary, whose tokens show each byte as one printable character.

    Raises:
        ValueError: a character that stands for no byte: the vocabulary is not byte-level.
    """
    table = _byte_of_char()
    try:
        return bytes(table[character] for character in token)
    except KeyError as error:
        raise ValueError(f"token {token!r}: {error.args[0]!r} stands for no byte; use incremental_bytes") from None


def incremental_bytes(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[bytes]:
    """Return per token what it adds to the decoded text, for vocabularies that are not byte-level.

    A token that ends inside a character adds nothing; the token that completes the character gets all its bytes. Decodes
    every prefix, so the cost is quadratic in the number of tokens.
    """
    pieces, before = [], ""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[:count])
        is_whole = not text.endswith("\ufffd") or count == len(token_ids)
        pieces.append(text[len(before) :].encode("utf-8") if is_whole else b"")
        before = text if is_whole else before
    return pieces


@cache
def _byte_of_char() -> dict[str, int]:
    """Return character -> byte of GPT-2's byte-level alphabet: printable Latin-1 is itself, the rest counts up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
