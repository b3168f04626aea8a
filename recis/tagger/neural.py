"""A neural tagger: word encoder, one linear layer, linear-chain CRF over BIO tags.

It is trained on gold spans (every word's tag is known) or on a pool (words outside its spans are unknown and allow every
tag). Texts longer than the encoder's window are read in windows that overlap by 64 words: a word's scores come from the
window in which it stands farther from an edge, and one Viterbi search runs over the whole text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recis.errors import DataError
from recis.tagger.crf import FORBIDDEN, LinearChainCRF, bio_tags
from recis.tagger.encoders import WordEncoder
from recis.tagger.evaluate import Typed, bio_spans
from recis.tagger.rules import Span
from recis.tagger.text import TOKENIZER, Text

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuralConfig:
    """Size and training of a neural tagger."""

    encoder: str | None = None
    """Folder of a Hugging Face encoder; None trains the small one."""
    dim: int = 128
    """Width of the small encoder's LSTM, both ways together."""
    gram_dim: int = 64
    dropout: float = 0.3
    epochs: int = 8
    batch_size: int = 32
    lr: float = 1e-4
    """Of the pretrained encoder."""
    head_lr: float = 2e-3
    """Of everything that starts at random."""
    train_embeddings: bool = False
    """Whether the piece vectors of a pretrained encoder are trained; they are half of MiniLM's weights."""
    layer_decay: float = 0.9
    """Factor on lr per layer, from the top down."""
    weight_decay: float = 0.01
    warmup: float = 0.06
    """Share of the steps over which learning rates rise."""
    clip: float = 1.0
    average: float = 0.0
    """Decay per step of a running mean of the weights that is used in the end; 0 uses the last weights."""
    bf16: bool = False
    """Whether the encoder multiplies in bfloat16; weights, head and CRF stay fp32. Several times faster with AMX."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1; got {self.epochs}, {self.batch_size}")
        if not 0 <= self.dropout < 1 or not 0 <= self.average < 1:
            raise ValueError(f"dropout and average must be in [0, 1); got {self.dropout}, {self.average}")


class TaggerModel(nn.Module):
    """Trains on spans and tags texts; `save` and `load` keep it in a folder of its own."""

    def __init__(
        self,
        types: Sequence[str],
        config: NeuralConfig,
        *,
        tokenizer: str = TOKENIZER,
        encoder_settings: Path | None = None,
    ) -> None:
        """Build with fresh weights; encoder_settings (a folder) builds the encoder without reading weights for it."""
        super().__init__()
        torch.manual_seed(config.seed)
        self.types = tuple(types)
        self.config = config
        self.tokenizer = tokenizer
        self.tags = bio_tags(self.types)
        self.encoder = WordEncoder(
            dim=config.dim,
            gram_dim=config.gram_dim,
            dropout=config.dropout,
            path=config.encoder and (encoder_settings or config.encoder),
            with_weights=encoder_settings is None,
        )
        self.head = nn.Linear(self.encoder.dim, len(self.tags))
        self.crf = LinearChainCRF(self.tags)

    def emissions(
        self, words: Sequence[Sequence[str]], pieces: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[Tensor, Tensor]:
        """Return scores [B, T, K] and lengths [B] of texts that fit a window."""
        batch = self.encoder.batch(words, pieces)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            states = self.encoder(batch)
        return self.head(states.float()), batch.lengths

    def tag_texts(self, texts: Sequence[Text], *, batch_size: int = 64) -> list[list[Span]]:
        """Return the spans of each text, left to right; conf is the least marginal probability among a span's words."""
        self.eval()
        pieces = [self.encoder.pieces_of(text.tokens) for text in texts]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number].tokens))
        order = [number for number in order if texts[number].tokens]
        found: list[list[Span]] = [[] for _ in texts]
        with torch.no_grad():
            for at in range(0, len(order), batch_size):
                numbers = order[at : at + batch_size]
                scores = (
                    [self._whole(texts[number].tokens, pieces[number]) for number in numbers]
                    if any(len(self.encoder.windows(pieces[number])) > 1 for number in numbers)
                    else None
                )
                if scores is None:
                    emissions, lengths = self.emissions(
                        [texts[n].tokens for n in numbers], [pieces[n] for n in numbers]
                    )
                else:
                    emissions = nn.utils.rnn.pad_sequence(scores, batch_first=True)
                    lengths = torch.tensor([len(score) for score in scores])
                paths = self.crf.best_paths(emissions, lengths)
                sure = self.crf.marginals(emissions, lengths)
                for row, number in enumerate(numbers):
                    found[number] = self._spans(texts[number], paths[row], sure[row])
        return found

    def tag_text(self, text: Text) -> list[Span]:
        """Return the spans of one text."""
        return self.tag_texts([text])[0]

    def _whole(self, words: Sequence[str], pieces: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores [T, K] of a text of any length, window by window."""
        windows = self.encoder.windows(pieces)
        parts: list[Tensor] = []
        for place, (start, end) in enumerate(windows):
            scores = self.emissions([words[start:end]], [pieces[start:end]])[0][0]
            # half of an overlap belongs to the window before, half to the window behind
            first = 0 if place == 0 else (windows[place - 1][1] + start) // 2
            last = len(words) if place == len(windows) - 1 else (end + windows[place + 1][0]) // 2
            parts.append(scores[first - start if place else 0 : last - start])
        return torch.cat(parts)

    def _spans(self, text: Text, path: Sequence[int], sure: Tensor) -> list[Span]:
        spans, _ = bio_spans([self.tags[tag] for tag in path])
        chosen = sure[torch.arange(len(path)), torch.tensor(path)].tolist()
        return [
            Span(
                start=start,
                end=end,
                type=name,
                conf=min(1.0, min(chosen[start:end])),
                char_start=text.starts[start],
                char_end=text.ends[end - 1],
                surface=text.surface(start, end),
            )
            for start, end, name in spans
        ]

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder: model.json, weights.safetensors, and the encoder's own files."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self.encoder.model is not None:
            self.encoder.model.config.save_pretrained(target / "encoder")
            self.encoder.tokenizer.save_pretrained(target / "encoder")
        record = {
            "format": FORMAT,
            "types": list(self.types),
            "tokenizer": self.tokenizer,
            "config": asdict(self.config),
        }
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, target / "weights.safetensors")
        (target / "model.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TaggerModel":
        """Read a model; what lies in the folder is enough.

        Raises:
            ValueError: the folder holds no tagger of this format.
        """
        path = Path(folder) / "model.json"
        if not path.is_file():
            raise DataError("is no tagger model: it has no model.json", file=str(folder))
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            raise DataError(f"model format {record.get('format')!r}; this version reads {FORMAT}", file=str(path))
        config = NeuralConfig(**record["config"])
        model = cls(record["types"], config, tokenizer=record["tokenizer"], encoder_settings=Path(folder) / "encoder")
        model.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
        return model.eval()


def allowed_tags(
    tags: Sequence[str], spans: Sequence[Typed], num_words: int, *, outside_known: bool, loose: bool = False
) -> Tensor:
    """Return the tags each word may have, [T, K] bool.

    A span of a pool speaks against every span that overlaps it: nothing may go on behind its end.

    Args:
        tags: O, B- and I- of each type.
        spans: labelled words.
        num_words: T.
        outside_known: words outside the spans are O; otherwise they may be anything that does not go on with a span.
        loose: a labelled word may begin a span or go on with one: the pool knows its type, not where its span ends.
    """
    number = {tag: place for place, tag in enumerate(tags)}
    allowed = torch.zeros(num_words, len(tags), dtype=torch.bool)
    if outside_known:
        allowed[:, number["O"]] = True
    else:
        allowed[:] = True
    if not loose:
        for _, end, name in spans:
            if end < num_words:
                allowed[end, number[f"I-{name}"]] = False
    for start, end, name in spans:
        allowed[start:end] = False
        if loose:
            allowed[start:end, [number[f"B-{name}"], number[f"I-{name}"]]] = True
        else:
            allowed[start, number[f"B-{name}"]] = True
            allowed[start + 1 : end, number[f"I-{name}"]] = True
    return allowed


def soft_tags(allowed: Tensor, conf: Tensor) -> Tensor:
    """Return soft labels [T, K]: log of how well each tag fits a word, 0 for a tag that is as good as certain.

    A tag that `allowed` has gets log conf of its word; the others share what is left: log (1 - conf) / (their number).
    Where every tag is allowed, nothing is known and all get 0. conf 1 leaves the hard labels.

    Args:
        allowed: [T, K] bool, of allowed_tags.
        conf: [T] in (0, 1], how sure the label of each word is.

    Raises:
        ValueError: a conf lies outside (0, 1].
    """
    if len(conf) and not (conf.min() > 0 and conf.max() <= 1):
        raise ValueError(f"conf must be in (0, 1]; got {float(conf.min())} to {float(conf.max())}")
    others = (~allowed).sum(1, keepdim=True)
    rest = torch.log((1 - conf)[:, None] / others.clamp(min=1)).clamp(min=FORBIDDEN)
    soft = torch.where(allowed, conf[:, None].log(), rest)
    return torch.where(others == 0, torch.zeros_like(soft), soft)
