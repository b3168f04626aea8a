"""Trained models that read an item's text whole, to compare EBRM with: the same encoder, the same labels.

    cross-encoder   [CLS] query [SEP] item text [SEP] -> one logit from the first token
    bi-encoder      z = a cos(u(query), v(item text)) + b,   u, v the mean of one encoder's token states

Both are fitted by `recis.ebrm.pretrain.fit`: the loss is the cross-entropy of the QI labels. Neither can say why, and
neither shares work between items: each (query, item) pair is read by the cross-encoder.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recis.ebrm.canonical import canonical_text
from recis.ebrm.descent import StepConfig
from recis.ebrm.pairs import QIPairs
from recis.ebrm.pretrain import OnEpoch, QETable, fit, merge_rows
from recis.ebrm.scorer import Pair

if TYPE_CHECKING:
    from recis.ebrm.encoder import EncoderScorer
    from recis.ebrm.labels_from_logs import QERow

ITEM_TOKENS = 48  # of query and item text together
START_SCALE, START_BIAS = 8.0, -4.0  # cos 0.5 counts as undecided before training


def text_table(pairs: QIPairs, texts: Sequence[str]) -> QETable:
    """Return labelled (query, item text) pairs as a table for `fit`; texts [I] are those of pairs.items."""
    return QETable(
        pairs=tuple(places(pairs, texts)), y=pairs.label.astype(np.float32), w=np.ones(len(pairs), np.float32)
    )


def places(pairs: QIPairs, texts: Sequence[str]) -> list[Pair]:
    """Return the texts [P] of pairs: canonical query, item text."""
    queries = [canonical_text(text) for text in pairs.queries]
    both = zip(pairs.query.tolist(), pairs.item.tolist(), strict=True)
    return [(queries[query], str(texts[item])) for query, item in both]


def fit_cross_encoder(
    encoder: "EncoderScorer",
    pairs: QIPairs,
    texts: Sequence[str],
    config: StepConfig,
    *,
    qe_rows: "Sequence[QERow]" = (),
    pretrain: StepConfig | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Fit a QI cross-encoder in place; stage A's rows are read first, as pairs of query and "type : value", if given.

    Raises:
        DataError: no pairs.
        ValueError: a loss or gradient that is not finite.
    """
    if pretrain is not None:
        fit(encoder, encoder, merge_rows(qe_rows), pretrain, on_epoch=on_epoch)
    fit(encoder, encoder.of_texts, text_table(pairs, texts), config, on_epoch=on_epoch)


@torch.inference_mode()
def cross_encoder_scores(
    encoder: "EncoderScorer", pairs: QIPairs, texts: Sequence[str], *, batch_pairs: int = 256
) -> np.ndarray:
    """Return logits [P] float64."""
    encoder.eval()
    both = places(pairs, texts)
    order = sorted(range(len(both)), key=lambda place: len(both[place][0]) + len(both[place][1]))
    out = np.empty(len(both))
    for first in range(0, len(order), batch_pairs):
        rows = order[first : first + batch_pairs]
        out[rows] = encoder.of_texts([both[row] for row in rows]).double().cpu().numpy()
    return out


class BiEncoder(nn.Module):
    """One encoder for both sides, and a scale and a bias. Attributes: scorer, scale, bias."""

    def __init__(self, scorer: "EncoderScorer") -> None:
        super().__init__()
        self.scorer = scorer
        self.scale = nn.Parameter(torch.tensor(START_SCALE))
        self.bias = nn.Parameter(torch.tensor(START_BIAS))

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P] of (query, item text); each distinct text is read once."""
        return self.logits(*(self._rows([pair[side] for pair in pairs]) for side in (0, 1)))

    def logits(self, queries: Tensor, items: Tensor) -> Tensor:
        """Return logits [P] of unit vectors [P, H]."""
        return self.scale * (queries * items).sum(1).float() + self.bias

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [N, H]: mean of the token states, padding left out."""
        hidden, mask = self.scorer.states(texts)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def _rows(self, texts: Sequence[str]) -> Tensor:
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        vectors = self.vectors(list(distinct))
        return vectors[torch.tensor([distinct[text] for text in texts], device=vectors.device)]


def fit_bi_encoder(
    model: BiEncoder, pairs: QIPairs, texts: Sequence[str], config: StepConfig, *, on_epoch: OnEpoch | None = None
) -> None:
    """Fit a bi-encoder in place; scale and bias have a rate of their own. Raises as `fit_cross_encoder`."""
    small = [[model.scale, model.bias]]
    fit(model, model, text_table(pairs, texts), config, small=small, on_epoch=on_epoch)


@torch.inference_mode()
def bi_encoder_scores(model: BiEncoder, pairs: QIPairs, texts: Sequence[str], *, batch_pairs: int = 256) -> np.ndarray:
    """Return logits [P] float64; each text is read once."""
    model.eval()
    queries = _vectors(model, [canonical_text(text) for text in pairs.queries], batch_pairs)
    items = _vectors(model, texts, batch_pairs)
    query, item = (torch.from_numpy(np.asarray(own, np.int64)) for own in (pairs.query, pairs.item))
    return model.logits(queries[query], items[item]).double().cpu().numpy()


def _vectors(model: BiEncoder, texts: Sequence[str], batch_pairs: int) -> Tensor:
    parts = [model.vectors(texts[first : first + batch_pairs]) for first in range(0, len(texts), batch_pairs)]
    return torch.cat(parts).float()
