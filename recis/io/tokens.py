"""Strings as token ids: what `Strings(tokenizer=...)` does in the reader's threads, so that no step waits for it.

    bytes of B strings -> Tokenizer of a folder (tokenizer.json), special tokens added, cut to max_tokens -> ids, B bags

A tokenizer is loaded once per folder and limit and only read afterwards, so threads share it; it runs outside Python's lock.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from recis.errors import ConfigError
from recis.jagged import JaggedTensor

TOKENIZER_FILE = "tokenizer.json"


def tokenize(strings: JaggedTensor, folder: str, max_tokens: int) -> JaggedTensor:
    """Return token ids, int64, one bag per string, at most max_tokens each, of a byte-jagged column of UTF-8 strings.

    Raises:
        ConfigError: the folder has no tokenizer.json that can be read, or tokenizers is not installed.
    """
    texts = [data.decode() for data in strings.to_strings()]
    found = [encoding.ids for encoding in load_tokenizer(folder, max_tokens).encode_batch_fast(texts)]
    return as_bags(found)


def as_bags(ids: Sequence[Sequence[int]]) -> JaggedTensor:
    """Return lists of integers as bags."""
    lengths = torch.tensor([len(own) for own in ids], dtype=torch.int64)
    return JaggedTensor(torch.tensor([token for own in ids for token in own], dtype=torch.int64), lengths)


@lru_cache(maxsize=16)
def load_tokenizer(folder: str, max_tokens: int) -> Any:
    """Return the tokenizer of a folder, cutting to max_tokens and never padding. Raises ConfigError as `tokenize`."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no {TOKENIZER_FILE} here; write one with AutoTokenizer.from_pretrained(folder).save_pretrained(...)"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("columns with a tokenizer need tokenizers: pip install 'recis[hf]'") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
    except (
        Exception
    ) as error:  # the library raises bare Exception for a damaged file and for a limit below its own tokens
        raise ConfigError(f"{path}: cannot be used with max_tokens={max_tokens}: {error}") from error
    return tokenizer
