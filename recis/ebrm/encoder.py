"""The cross-encoder behind QEScorer: a Hugging Face encoder, its tokenizer, and one logit from the first token.

    [CLS] query [SEP] type : value [SEP]   -> h [P, H];   z = w . h[first token] + b,   b = 0 at the start

A positive bias at the start would hurt product logic: everything would be accepted, and no entity told from the next.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from recis.ebrm.entities import type_of, value_of
from recis.ebrm.scorer import ENCODER_NAME, MAX_TOKENS, Pair, QEScorer
from recis.ebrm.wordpiece import learn_pieces
from recis.errors import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALL_VOCABULARY = 8_000
HEAD_NAME, SETTINGS_NAME = "head.safetensors", "scorer.json"
_INIT_STD = 0.02
_MAX_WORD_CHARACTERS = 100  # a longer word is [UNK] to WordPiece


class EncoderScorer(QEScorer):
    """A cross-encoder. Attributes: encoder, tokenizer, head, max_tokens."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, *, seed: int = 0, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        if max_tokens < 8:
            raise ConfigError(f"max_tokens must be at least 8; got {max_tokens}")
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.head = nn.Linear(encoder.config.hidden_size, 1)  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0.0, _INIT_STD, generator=generator)
            self.head.bias.zero_()

    @staticmethod
    def from_folder(folder: Path, *, seed: int, max_tokens: int) -> "EncoderScorer":
        """See QEScorer.from_encoder."""
        if not (folder / "config.json").is_file():
            raise ConfigError(f"no encoder at {folder}: a folder with config.json, weights and tokenizer is needed")
        try:
            encoder = _without_pooler(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the encoder at {folder} cannot be read: {error}") from error
        return EncoderScorer(encoder, tokenizer, seed=seed, max_tokens=max_tokens)

    @staticmethod
    def small(corpus: Iterable[str], *, seed: int = 0, max_tokens: int = MAX_TOKENS) -> "EncoderScorer":
        """See QEScorer.small."""
        tokenizer = train_wordpiece(corpus)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=max(64, max_tokens),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = BertModel(config, add_pooling_layer=False)
        return EncoderScorer(encoder, tokenizer, seed=seed, max_tokens=max_tokens)

    @staticmethod
    def read(folder: Path) -> "EncoderScorer":
        """Return the scorer that `save` wrote."""
        settings = json.loads((folder / SETTINGS_NAME).read_text())
        scorer = EncoderScorer.from_folder(folder, seed=0, max_tokens=settings["max_tokens"])
        scorer.head.load_state_dict(load_file(folder / HEAD_NAME))
        return scorer

    def save(self, folder: Path) -> None:
        """Write encoder, tokenizer and head."""
        target = folder / ENCODER_NAME
        target.mkdir()
        self.encoder.save_pretrained(target)  # type: ignore[operator]
        self.tokenizer.save_pretrained(target)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, target / HEAD_NAME)
        (target / SETTINGS_NAME).write_text(json.dumps({"max_tokens": self.max_tokens}))

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P]."""
        if not pairs:
            return self.head.bias.new_empty(0)
        inputs = self._tokens(pairs)
        hidden = self.encoder(**inputs).last_hidden_state
        return self.head(hidden[:, 0]).squeeze(1).float()

    def update_hash(self, digest: "hashlib._Hash") -> None:
        """Feed weights and tokenizer into a hash."""
        super().update_hash(digest)
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # of the last call: not of the tokenizer
            del parts[name]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        digest.update(str(self.max_tokens).encode())

    def _tokens(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and token types [P, L]; the longer side of a pair is cut, and counted."""
        batch = self.tokenizer(
            [query[: _CHARACTERS_PER_TOKEN * self.max_tokens] for query, _ in pairs],
            [text_of(entity) for _, entity in pairs],
            truncation="longest_first",
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
            return_overflowing_tokens=False,
        )
        self.truncated_pairs += self._count_truncated(pairs, batch)
        return {name: tensor.to(self.head.weight.device) for name, tensor in batch.items()}

    def _count_truncated(self, pairs: Sequence[Pair], batch: Any) -> int:
        """Count pairs whose tokens fill the limit and do not reach the ends of both texts."""
        full = (batch["attention_mask"].sum(1) >= self.max_tokens).nonzero().flatten().tolist()
        count = 0
        for place in full:
            query, entity = pairs[place]
            lengths = self.tokenizer([query[:10_000], text_of(entity)], add_special_tokens=False)["input_ids"]
            count += sum(map(len, lengths)) + 3 > self.max_tokens
        return count


def _without_pooler(folder: Path) -> Any:
    """Return the encoder of a folder in float32; a pooler is never read, and fresh ones would change the model version."""
    try:
        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False)
    except TypeError:  # an architecture without a pooler does not know the argument
        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


_CHARACTERS_PER_TOKEN = 64  # more of a query than its first 32 tokens is not even split


def text_of(entity_id: str) -> str:
    """Return the encoder's text of an entity id: "type : value"."""
    return f"{type_of(entity_id)} : {value_of(entity_id)}"


def train_wordpiece(corpus: Iterable[str]) -> Any:
    """Return a BERT tokenizer with a lower-case WordPiece vocabulary of at most 8,000, learned from a corpus.

    The same texts, in any order, give the same vocabulary.

    Raises:
        ConfigError: the corpus has no words.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter[str]()
    for text in corpus:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    pieces = learn_pieces(
        {word: count for word, count in counts.items() if len(word) <= _MAX_WORD_CHARACTERS},
        SMALL_VOCABULARY - len(SPECIAL),
    )
    if not pieces:
        raise ConfigError("the corpus of a small encoder has no words; give titles, queries and entity texts")
    return BertTokenizer(vocab={word: place for place, word in enumerate((*SPECIAL, *pieces))}, do_lower_case=True)
