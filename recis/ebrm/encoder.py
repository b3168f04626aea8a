"""The cross-encoder behind QEScorer: a Hugging Face encoder, its tokenizer, and one logit from the first token.

    [CLS] query [SEP] type : value [SEP]   -> h [P, H];   z = w . h[first token] + b,   b = 0 at the start

Where the schema declares other spellings of a value, they follow it: "category : frying pan , skillet". A shopper who types
"skillet" means the frying pan; an encoder that does not see so has to learn each such pair by heart from clicks.
A positive bias at the start would hurt product logic: everything would be accepted, and no entity told from the next.

The small encoder is told which pieces stand on both sides: they get token types of their own, 2 and 3 in place of 0 and 1.
Fresh weights learn that equal pieces are equal only from far more pairs than a catalogue has; with the marks a few hundred
queries are enough, and a model code that training never saw matches too. The head of a word and its inside count as the
same piece, so "ik 1620" meets "ik1620". Pretrained encoders have the two token types that they were trained with.
Source of marking exact matches in the input: Boualili et al. 2020, SIGIR, "MarkedBERT"; token types for it are ours.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from recis.ebrm.entities import type_of, value_of
from recis.ebrm.scorer import ENCODER_NAME, MAX_TOKENS, Pair, QEScorer
from recis.ebrm.wordpiece import INSIDE, learn_pieces
from recis.errors import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALL_VOCABULARY = 8_000
HEAD_NAME, SETTINGS_NAME = "head.safetensors", "scorer.json"
_INIT_STD = 0.02
_MAX_WORD_CHARACTERS = 100  # a longer word is [UNK] to WordPiece


class EncoderScorer(QEScorer):
    """A cross-encoder.

    Attributes:
        encoder, tokenizer, head: its parts.
        max_tokens: longest input; the longer side is cut.
        has_marks: whether pieces that stand on both sides have token types of their own; the encoder then has 4.
        spellings: entity id -> other spellings that follow its value.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        *,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
        has_marks: bool = False,
        spellings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if max_tokens < 8:
            raise ConfigError(f"max_tokens must be at least 8; got {max_tokens}")
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.has_marks = has_marks
        self.spellings = {entity: tuple(texts) for entity, texts in spellings.items()}
        self._attention = encoder.config._attn_implementation  # type: ignore[union-attr]
        self._bare: Tensor
        self.register_buffer("_bare", bare_pieces(tokenizer) if has_marks else torch.zeros(0), persistent=False)
        self.head = nn.Linear(encoder.config.hidden_size, 1)  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0.0, _INIT_STD, generator=generator)
            self.head.bias.zero_()

    @staticmethod
    def from_folder(
        folder: Path,
        *,
        seed: int,
        max_tokens: int,
        has_marks: bool = False,
        spellings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> "EncoderScorer":
        """See QEScorer.from_encoder."""
        if not (folder / "config.json").is_file():
            raise ConfigError(f"no encoder at {folder}: a folder with config.json, weights and tokenizer is needed")
        try:
            encoder = _without_pooler(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the encoder at {folder} cannot be read: {error}") from error
        return EncoderScorer(
            encoder, tokenizer, seed=seed, max_tokens=max_tokens, has_marks=has_marks, spellings=spellings
        )

    @staticmethod
    def small(
        corpus: Iterable[str],
        *,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
        spellings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> "EncoderScorer":
        """See QEScorer.small."""
        tokenizer = train_wordpiece(corpus)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=max(64, max_tokens),
            type_vocab_size=4,
            hidden_dropout_prob=0.0,  # 0.1 costs a third of a step on a CPU, and a few epochs do not need it
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = BertModel(config, add_pooling_layer=False)
        return EncoderScorer(encoder, tokenizer, seed=seed, max_tokens=max_tokens, has_marks=True, spellings=spellings)

    @staticmethod
    def read(folder: Path) -> "EncoderScorer":
        """Return the scorer that `save` wrote."""
        settings = json.loads((folder / SETTINGS_NAME).read_text())
        scorer = EncoderScorer.from_folder(
            folder,
            seed=0,
            max_tokens=settings["max_tokens"],
            has_marks=settings.get("has_marks", False),  # folders written before there were marks have neither
            spellings=settings.get("spellings", {}),
        )
        scorer.head.load_state_dict(load_file(folder / HEAD_NAME))
        return scorer

    def save(self, folder: Path) -> None:
        """Write encoder, tokenizer and head."""
        target = folder / ENCODER_NAME
        target.mkdir()
        self.encoder.save_pretrained(target)  # type: ignore[operator]
        self.tokenizer.save_pretrained(target)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, target / HEAD_NAME)
        settings = {"max_tokens": self.max_tokens, "has_marks": self.has_marks, "spellings": self.spellings}
        (target / SETTINGS_NAME).write_text(json.dumps(settings, sort_keys=True))

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P]."""
        return self.of_texts([(query, text_of(entity, self.spellings.get(entity, ()))) for query, entity in pairs])

    def of_texts(self, texts: Sequence[tuple[str, str]]) -> Tensor:
        """Return logits [P] float32 of two texts each: what a QI cross-encoder reads is a query and an item's text."""
        if not texts:
            return self.head.bias.new_empty(0)
        hidden = self.encoder(**self._tokens(texts)).last_hidden_state
        return self.head(hidden[:, 0]).squeeze(1).float()

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token states [N, L, H] of single texts, and their mask [N, L, 1]: what a bi-encoder pools."""
        cut = [text[: _CHARACTERS_PER_TOKEN * self.max_tokens] for text in texts]
        batch = self.tokenizer(cut, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt")
        inputs = {name: tensor.to(self.head.weight.device) for name, tensor in batch.items()}
        return self.encoder(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]

    def train(self, mode: bool = True) -> "EncoderScorer":
        """Set the mode as torch does, and the attention that is fast in it.

        torch's fused attention on a CPU takes three quarters of a bf16 step for its gradient; at 32 tokens plain matrix
        products are several times as fast. Without gradients the fused one is kept.
        """
        super().train(mode)
        wanted = "eager" if mode else self._attention
        if self.encoder.config._attn_implementation != wanted:  # type: ignore[union-attr]
            self.encoder.set_attn_implementation(wanted)  # type: ignore[operator]
        return self

    def update_hash(self, digest: "hashlib._Hash") -> None:
        """Feed weights and tokenizer into a hash."""
        super().update_hash(digest)
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # of the last call: not of the tokenizer
            del parts[name]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        digest.update(str(self.max_tokens).encode())
        if self.spellings:
            digest.update(json.dumps(self.spellings, sort_keys=True).encode())

    def _tokens(self, texts: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and token types [P, L]; the longer side of a pair is cut, and counted."""
        batch = self.tokenizer(
            [first[: _CHARACTERS_PER_TOKEN * self.max_tokens] for first, _ in texts],
            [second[: _CHARACTERS_PER_TOKEN * self.max_tokens] for _, second in texts],
            truncation="longest_first",
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
            return_overflowing_tokens=False,
        )
        self.truncated_pairs += self._count_truncated(texts, batch)
        inputs = {name: tensor.to(self.head.weight.device) for name, tensor in batch.items()}
        if self.has_marks:
            inputs["token_type_ids"] = marked_types(self._bare[inputs["input_ids"]], inputs["token_type_ids"])
        return inputs

    def _count_truncated(self, texts: Sequence[tuple[str, str]], batch: Any) -> int:
        """Count pairs whose tokens fill the limit and do not reach the ends of both texts."""
        full = (batch["attention_mask"].sum(1) >= self.max_tokens).nonzero().flatten().tolist()
        count = 0
        for place in full:
            cut = [text[:10_000] for text in texts[place]]
            lengths = self.tokenizer(cut, add_special_tokens=False)["input_ids"]
            count += sum(map(len, lengths)) + 3 > self.max_tokens
        return count


def _without_pooler(folder: Path) -> Any:
    """Return the encoder of a folder in float32; a pooler is never read, and fresh ones would change the model version."""
    try:
        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False)
    except TypeError:  # an architecture without a pooler does not know the argument
        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


MAX_SPELLINGS = 4  # of 32 tokens the query wants its share
_CHARACTERS_PER_TOKEN = 64  # more of a query than its first 32 tokens is not even split


def text_of(entity_id: str, spellings: Sequence[str] = ()) -> str:
    """Return the encoder's text of an entity id: "type : value", and up to MAX_SPELLINGS others behind commas."""
    return " , ".join((f"{type_of(entity_id)} : {value_of(entity_id)}", *spellings[:MAX_SPELLINGS]))


def bare_pieces(tokenizer: Any) -> Tensor:
    """Return [V] int64: token id -> a number of the piece without its "##"; 0 for special tokens."""
    vocabulary = tokenizer.get_vocab()
    numbers: dict[str, int] = {}
    special = set(tokenizer.all_special_tokens)
    bare = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for piece, place in sorted(vocabulary.items(), key=lambda entry: entry[1]):
        if piece not in special:
            bare[place] = numbers.setdefault(piece.removeprefix(INSIDE), len(numbers) + 1)
    return bare


def marked_types(bare: Tensor, types: Tensor) -> Tensor:
    """Return token types [P, L]: 2 more where the same piece stands on the other side, too.

    Args:
        bare: [P, L] pieces, 0 for what never matches.
        types: [P, L], 0 on the first side and 1 on the second; padding has any.
    """
    first = torch.where(types == 0, bare, 0)
    second = torch.where(types == 1, bare, 0)
    equal = (first[:, :, None] == second[:, None, :]) & (first != 0)[:, :, None]
    return types + 2 * (equal.any(2) | equal.any(1)).long()


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
