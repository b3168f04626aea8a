"""Spread the types of a few labelled words to all words: a small classifier on a frozen encoder, taught by itself.

Each word is described by its vector alone, by two layers of the encoder in its text, and by its place and shape. A first
classifier learns the labelled words and, with little weight, that the last word of a noun phrase is its head. Its
log-probabilities are shifted until the types' shares over all words are what the caller expects, the surest words per
type become labels, and a wider classifier learns those; a few times over.

    log p'(t | w) = log p(t | w) + b_t,     b_t such that the mean of p'(t | w) over all words is share_t

Ours; it plays the neural tagger in the loop of recis.tagger.distil while the pool is too thin for a full one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recis.tagger.encoders import WordEncoder, mean_per_word
from recis.tagger.rules import Span
from recis.tagger.text import Text

ALIGN_STEPS = 60
MIN_SOFT = -6.0  # least soft label: no word's type is ever out of the question
GOES_ON = 0.98  # how sure the word behind a joining word is of the same span


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadConfig:
    """How labels spread."""

    kept: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Share of the words per type, surest first, that teach the next classifier; one entry per pass."""
    joining: frozenset[str] = frozenset()
    """Words without a type of their own ("for"): they belong to the word behind them."""
    head_type: str | None = None
    """Type that the head of a text likely has: its last word, or the one before the first of `ends_head`. None: no guess."""
    ends_head: frozenset[str] = frozenset()
    """Words that end a noun phrase ("for", "with")."""
    head_weight: float = 0.05
    """Of a guessed head beside a labelled word, in the first classifier."""
    hidden: int = 256
    epochs: int = 12
    lr: float = 1e-3
    bf16: bool = False
    """Whether the classifiers multiply in bfloat16: several times faster with AMX."""
    seed: int = 0


class WordSpreader:
    """A tagger for recis.tagger.distil over a fixed set of texts. `shares` says how often each type is expected."""

    def __init__(
        self,
        texts: Sequence[Text],
        types: Sequence[str],
        shares: Mapping[str, float],
        encoder: str,
        config: SpreadConfig | None = None,
    ) -> None:
        """Encode all texts once.

        Raises:
            ValueError: shares lacks a type, or holds a negative number.
        """
        missing = [name for name in types if name not in shares]
        if missing or any(share < 0 for share in shares.values()):
            raise ValueError(f"shares must give each type a number >= 0; missing {missing}, given {dict(shares)}")
        self.types = tuple(types)
        self.config = config or SpreadConfig()
        self._rows: dict[Text, int] = {}
        self._distinct: list[Text] = []
        for text in texts:
            if text not in self._rows:
                self._rows[text] = len(self._distinct)
                self._distinct.append(text)
        self._begins = np.concatenate([[0], np.cumsum([len(text.tokens) for text in self._distinct])])
        self._words = [word for text in self._distinct for word in text.tokens]
        self._is_joining = np.array([word in self.config.joining for word in self._words], dtype=bool)
        self._features = word_features(self._distinct, encoder)
        share = np.array([shares[name] for name in self.types], dtype=np.float64) + 1e-4
        self._share = share / share.sum()
        self._log_probs = np.zeros((len(self._words), len(self.types)))

    def fit(self, texts: Sequence[Text], spans: Sequence[Sequence[Span]]) -> None:
        """Learn from spans of known texts.

        Raises:
            ValueError: a text was not given at the start, or there is no span.
        """
        given = np.full(len(self._words), -1)
        for text, found in zip(texts, spans, strict=True):
            if text not in self._rows:
                raise ValueError(f"text {text.text!r} is not among the texts the spreader was made with")
            begin = self._begins[self._rows[text]]
            for span in found:
                given[begin + span.start : begin + span.end] = self.types.index(span.type)
        given[self._is_joining] = -1
        labelled = np.flatnonzero(given >= 0)
        if not len(labelled):
            raise ValueError("spreading needs at least one labelled word; got none")
        one_hot = np.eye(len(self.types))
        often: dict[str, int] = {}
        for place in labelled:
            often[self._words[place]] = often.get(self._words[place], 0) + 1
        weights = np.array([often[self._words[place]] ** -0.5 for place in labelled])  # rare words say as much
        open_words = ~self._is_joining
        heads = np.flatnonzero(self._is_head() & open_words & (given < 0))
        kinds = np.concatenate([given[labelled], np.full(len(heads), self._head_type)])
        weights = np.concatenate([weights, np.full(len(heads), self.config.head_weight)])
        rows = np.concatenate([labelled, heads])
        found = self._learn(rows, one_hot[kinds], weights, hidden=0, epochs=20, lr=5e-3)
        for kept in self.config.kept:
            shifted = align(found, self._share, open_words)
            probs = np.exp(shifted - np.logaddexp.reduce(shifted, axis=1, keepdims=True))
            best, sure = probs.argmax(1), probs.max(1)
            best[labelled], sure[labelled] = given[labelled], 1.0
            chosen = [labelled]
            for number in range(len(self.types)):
                places = np.flatnonzero((best == number) & open_words)
                chosen.append(places[np.argsort(-sure[places], kind="stable")[: max(30, int(kept * len(places)))]])
            rows = np.unique(np.concatenate(chosen))
            target = 0.7 * one_hot[best[rows]] + 0.3 * probs[rows]
            fixed = given[rows] >= 0
            target[fixed] = one_hot[given[rows][fixed]]
            found = self._learn(
                rows,
                target,
                np.ones(len(rows)),
                hidden=self.config.hidden,
                epochs=self.config.epochs,
                lr=self.config.lr,
            )
        shifted = align(found, self._share, open_words)
        shifted[labelled] = np.where(one_hot[given[labelled]] > 0, 0.0, -20.0)
        self._log_probs = shifted - np.logaddexp.reduce(shifted, axis=1, keepdims=True)

    def _is_head(self) -> np.ndarray:
        """Return which words [W] are guessed to be heads: words of letters only, at the end of a text's noun phrase."""
        found = np.zeros(len(self._words), dtype=bool)
        if self.config.head_type is None:
            return found
        for begin, text in zip(self._begins, self._distinct, strict=False):
            places = range(1, len(text.tokens))
            end = next((at for at in places if text.tokens[at] in self.config.ends_head), len(text.tokens))
            if end and text.tokens[end - 1].isalpha() and len(text.tokens[end - 1]) > 2:
                found[begin + end - 1] = True
        return found

    @property
    def _head_type(self) -> int:
        return -1 if self.config.head_type is None else self.types.index(self.config.head_type)

    def soft_labels(self, text: Text, tags: Sequence[str]) -> Tensor:
        """Return soft BIO labels [T, K] of a text, as recis.tagger.crf takes them.

            B-x: log p(x of the word) (1 - p(x of the word before))      I-x: log p(x of the word) p(x of the word before)

        A joining word has the type of the word behind it, which goes on with its span. O is as likely as a uniform guess,
        so that a word may be O where the classifier is lost. The two factors of a span's inside are taken as independent.
        """
        begin = self._begins[self._rows[text]]
        probs = np.exp(self._log_probs[begin : begin + len(text.tokens)])
        is_joining = self._is_joining[begin : begin + len(text.tokens)]
        for place in range(len(probs) - 2, -1, -1):
            if is_joining[place]:
                probs[place] = probs[place + 1]
        before = np.concatenate([np.zeros((1, len(self.types))), probs[:-1]])
        before[1:][is_joining[:-1]] = GOES_ON
        soft = np.full((len(probs), len(tags)), -np.log(len(self.types)))
        number = {name: place for place, name in enumerate(self.types)}
        for place, tag in enumerate(tags):
            if tag != "O":
                kind = number[tag[2:]]
                follows = before[:, kind] if tag.startswith("I-") else 1 - before[:, kind]
                soft[:, place] = np.log(np.maximum(probs[:, kind] * follows, np.exp(MIN_SOFT)))
        return torch.from_numpy(soft).float()

    def predict(self, texts: Sequence[Text]) -> list[list[Span]]:
        """Return spans that cover every word: neighbours of one type are one span; conf is the least of its words."""
        return [self._spans(text) for text in texts]

    def _spans(self, text: Text) -> list[Span]:
        begin = self._begins[self._rows[text]]
        rows = self._log_probs[begin : begin + len(text.tokens)]
        best, sure = rows.argmax(1).tolist(), np.exp(rows.max(1)).tolist()
        for place in range(len(best) - 2, -1, -1):
            if self._is_joining[begin + place]:
                best[place], sure[place] = best[place + 1], sure[place + 1]
        spans: list[Span] = []
        start = 0
        for end in range(1, len(best) + 1):
            if end == len(best) or best[end] != best[start]:
                spans.append(
                    Span(
                        start=start,
                        end=end,
                        type=self.types[best[start]],
                        conf=min(sure[start:end]),
                        char_start=text.starts[start],
                        char_end=text.ends[end - 1],
                        surface=text.surface(start, end),
                    )
                )
                start = end
        return spans

    def _learn(
        self, rows: np.ndarray, target: np.ndarray, weights: np.ndarray, *, hidden: int, epochs: int, lr: float
    ) -> np.ndarray:
        """Train a classifier on some words and return its log-probabilities of all words [W, K]."""
        torch.manual_seed(self.config.seed)
        width, num_types = self._features.shape[1], len(self.types)
        layers: list[nn.Module] = [nn.Dropout(0.2), nn.Linear(width, hidden or num_types)]
        if hidden:
            layers += [nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, num_types)]
        net = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
        inputs = self._features[torch.from_numpy(rows)]
        wanted = torch.tensor(target, dtype=torch.float32)
        scale = torch.tensor(weights / weights.mean(), dtype=torch.float32)
        for _ in range(epochs):
            for batch in torch.randperm(len(rows)).split(256):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
                    scores = net(inputs[batch])
                losses = -(wanted[batch] * torch.log_softmax(scores.float(), 1)).sum(1) * scale[batch]
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
        net.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            scores = net(self._features)
        return torch.log_softmax(scores.float(), 1).double().numpy()


def align(log_probs: np.ndarray, share: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return log_probs [W, K] shifted per type so that the mean probability over counted words [W] bool is near share [K]."""
    shift = np.zeros(len(share))
    for _ in range(ALIGN_STEPS):
        moved = log_probs[counted] + shift
        probs = np.exp(moved - np.logaddexp.reduce(moved, axis=1, keepdims=True))
        shift += 0.5 * (np.log(share) - np.log(probs.mean(0) + 1e-6))
    return log_probs + shift


@torch.no_grad()
def word_features(texts: Sequence[Text], encoder: str) -> Tensor:
    """Return [W, 3 D + 6] float32 for all words of all texts, from a frozen encoder of width D."""
    model = WordEncoder(path=encoder).eval()
    alone = {
        word: vector for (word,), vector in _encode(model, sorted({(w,) for t in texts for w in t.tokens}), alone=True)
    }
    inside = dict(_encode(model, sorted({text.tokens for text in texts}), alone=False))
    rows = [
        torch.cat(
            [
                nn.functional.normalize(torch.stack([alone[word] for word in text.tokens]), dim=1),
                inside[text.tokens],
                torch.tensor([_place(text.tokens, at) for at in range(len(text.tokens))]),
            ],
            dim=1,
        )
        for text in texts
        if text.tokens
    ]
    return torch.cat(rows)


def _place(words: Sequence[str], at: int) -> list[float]:
    word = words[at]
    digits = any(char.isdigit() for char in word)
    return [float(v) for v in (at == 0, at == len(words) - 1, len(words) == 1, digits, word.isdigit(), len(word) < 4)]


def _encode(
    model: WordEncoder, texts: Sequence[tuple[str, ...]], *, alone: bool
) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    """Yield each text with its mean vector [D], or with two layers of each word [T, 2 D]."""
    order = sorted(texts, key=len)
    for at in range(0, len(order), 128):
        some = [text for text in order[at : at + 128] if text]
        if not some:
            continue
        batch = model.batch(some, [model.pieces_of(text) for text in some])
        mask = (batch.pieces != model.pad).long()
        out = model.model(input_ids=batch.pieces, attention_mask=mask, output_hidden_states=True)
        if alone:
            vectors = (out.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            yield from zip(some, vectors, strict=True)
            continue
        width = max(map(len, some))
        middle = out.hidden_states[len(out.hidden_states) // 2]
        layers = [
            nn.functional.normalize(mean_per_word(states, batch.piece_word, width), dim=2)
            for states in (out.last_hidden_state, middle)
        ]
        both = torch.cat(layers, dim=2)
        for row, text in enumerate(some):
            yield text, both[row, : len(text)]
