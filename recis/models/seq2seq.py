"""Seq2seq over item ids: read a history, write the items that follow, one after another.

    memory   = encoder(history's rows + rows by place from its end)       every item sees every other
    states   = decoder([start, y_1, ..., y_n] + rows by place, memory)    causal, with cross-attention
    p(y_t+1 | y_1 ... y_t, history) = softmax over [items of a catalogue, end]

    loss     = - sum over t of log p(next | ...), the end after the last item included

Both sides are jagged: histories and continuations of any lengths, no padding. In writing, each new item costs one row per
layer: keys and values of what was written are kept (`Written`), those of the history once per sample whatever the number of
beams. As in next_item, training gives the weighted sum, a scalar, and evaluation [B, 2]: log p of the whole continuation and
the number of its items and end. Source: the transformer of Vaswani et al. 2017, arXiv:1706.03762, in its pre-norm form; items
as the words as in generative retrieval (Zhai et al. 2024, arXiv:2402.17152, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig, TableSet
from recis.errors import ConfigError
from recis.jagged import JaggedTensor
from recis.models.din import Interest, aligned
from recis.models.layers import check_widths
from recis.models.next_item import check_shared
from recis.models.retrieval_head import IGNORED, FullSoftmax, RetrievalHead
from recis.models.sampling import Catalogue
from recis.models.sequence_layers import Memory, PositionEmbedding, TransformerBlock, check_dropout, with_start
from recis.models.synthetic_sequences import ITEM, NEXT, sequence_catalogue, sequence_tables
from recis_kernels.jagged import bag_of_value
from recis_kernels.jagged_runs import concat_bags
from recis_kernels.linear_cross_entropy import linear_cross_entropy
from recis_kernels.segment import segment_sum

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqConfig:
    """Tables shared by histories, continuations and the catalogue's items."""

    tables: tuple[TableConfig, ...]
    source: Interest
    """`sequence`: the history's features; `target`: the catalogue's, in the same order."""
    following: Interest
    """`sequence`: the features of what follows; `target`: as that of source."""
    catalogue: Callable[[], Catalogue]
    """Makes the items that can be written; its key is the first feature of `target`."""
    num_layers: int = 2
    """Of the encoder, and of the decoder."""
    num_heads: int = 2
    hidden: int | None = None
    """Width inside the feed-forward nets; None: four times that of the item vectors."""
    num_positions: int = 256
    """Places with a row of their own, on each side; later ones share the last."""
    dropout: float = 0.1
    seed: int = 0
    """Of the tables' first weights."""

    def __post_init__(self) -> None:
        check_widths("Seq2Seq", self.num_layers, self.num_heads, self.num_positions, self.hidden or 1)
        check_dropout("Seq2Seq", self.dropout)
        if self.following.target != self.source.target:
            raise ConfigError(
                f"Seq2Seq: source and following must name the same catalogue features; got {self.source.target} and "
                f"{self.following.target}"
            )

    def build(self) -> "Seq2Seq":
        """Return the model with fresh weights."""
        return Seq2Seq(self)


class Written(NamedTuple):
    """What the decoder keeps of N continuations it is writing.

    Attributes:
        past: keys and values of the items written so far, per layer.
        memories: keys and values of the histories, per layer; one per sample.
        words: [V + 1, W], see Seq2Seq.word_vectors.
        num_written: rows of each continuation so far, the start included.
    """

    past: tuple[Memory, ...]
    memories: tuple[Memory, ...]
    words: Tensor
    num_written: int


class Beams(NamedTuple):
    """Continuations found for B samples, best first.

    Attributes:
        ids: [B, K, T] int64; what stands behind a continuation's length means nothing.
        lengths: [B, K] items of each, at most T.
        log_prob: [B, K] of the whole; without the end's where a continuation was cut at T. -inf: none of that number.
    """

    ids: Tensor
    lengths: Tensor
    log_prob: Tensor


class Seq2Seq(nn.Module):
    """forward(batch) -> scalar loss in training, [B, 2] in evaluation; `write` continues histories."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        tables = TableSet(config.tables, seed=config.seed)
        check_shared(tables, config.source)
        check_shared(tables, config.following)
        features = dict.fromkeys((*config.source.sequence, *config.following.sequence))
        self.sequences = EmbeddingCollection(tables, features=tuple(features))
        self.histories = EmbeddingCollection(tables, features=config.source.sequence)
        self.head = RetrievalHead(tables, config.source.target, config.catalogue, FullSoftmax(), seed=config.seed)
        width = self.head.width
        hidden = config.hidden or 4 * width
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.end = nn.Parameter(torch.randn(width) * 0.02)
        self.source_positions = PositionEmbedding(width, config.num_positions, from_end=True)
        self.positions = PositionEmbedding(width, config.num_positions)
        self.drop = nn.Dropout(config.dropout)
        layers = range(config.num_layers)
        self.encoder = nn.ModuleList(
            TransformerBlock(width, config.num_heads, hidden, dropout=config.dropout, activation=nn.GELU)
            for _ in layers
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            TransformerBlock(width, config.num_heads, hidden, dropout=config.dropout, activation=nn.GELU, cross=True)
            for _ in layers
        )
        self.norm = nn.LayerNorm(width)

    # ---- training and evaluation

    def forward(self, batch: "Batch") -> Tensor:
        found = self.sequences(batch.sparse)
        source, following = aligned(self.config.source, found), aligned(self.config.following, found)
        memories = self._memories(source)
        offsets = following.offsets.long()
        rows, longer = with_start(self.start, following.flat_values, offsets)
        rows = self.drop(self.positions(rows, longer))
        for block, memory in zip(self.decoder, memories, strict=True):
            rows = block(rows, longer, causal=True, memory=memory)
        places, known = self.targets(batch)
        weights = torch.ones_like(known, dtype=torch.float32)
        if self.training:
            weights = batch.weights[bag_of_value(longer, len(places))]
            return self._loss(self.norm(rows), places, weights, reduction="sum")
        losses = self._loss(self.norm(rows), places, weights, reduction="none")
        return segment_sum(torch.stack([-losses, known.float()], dim=1), longer)

    def targets(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Return (class of what follows each decoder row [L + B], whether it counts): V stands for the end."""
        following = batch.sparse[self.config.following.sequence[0]]
        places, known = self.head.catalogue.find(following.flat_values)
        places = torch.where(known, places, IGNORED)
        size, end = following.num_bags, len(self.head.catalogue)
        ends, one_each = places.new_full((size,), end), torch.arange(size + 1, device=places.device)
        places, _ = concat_bags(places, following.offsets.long(), ends, one_each)
        return places, places != IGNORED

    def _loss(self, states: Tensor, places: Tensor, weights: Tensor, *, reduction: str) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return linear_cross_entropy(
                states.float(),
                self.word_vectors(),
                places,
                token_weights=weights,
                reduction="sum" if reduction == "sum" else "none",
                ignore_index=IGNORED,
            )

    def word_vectors(self) -> Tensor:
        """Return [V + 1, W]: the catalogue's items in the order of their ids, then the end."""
        return torch.cat([self.head.all_vectors(), self.end[None]])

    def _memories(self, source: JaggedTensor) -> tuple[Memory, ...]:
        """Return keys and values of the histories for each layer of the decoder."""
        offsets = source.offsets.long()
        rows = self.drop(self.source_positions(source.flat_values, offsets))
        for block in self.encoder:
            rows = block(rows, offsets, causal=False)
        rows = self.encoder_norm(rows)
        return tuple(block.cross.remember(rows, offsets) for block in self.decoder)  # type: ignore[union-attr,operator]

    # ---- writing

    def begin(self, batch: "Batch") -> tuple[Tensor, Written]:
        """Read the histories; return (log p of the first item or the end [B, V + 1], what to go on with)."""
        memories = self._memories(aligned(self.config.source, self.histories(batch.sparse)))
        nothing = Written((), memories, self.word_vectors(), 0)
        return self.extend(self.start.expand(batch.num_samples, -1), nothing)

    def extend(self, rows: Tensor, written: Written) -> tuple[Tensor, Written]:
        """Return (log p of what follows [N, V + 1], what to go on with) after one more row [N, W] per continuation.

        N is a multiple of the number of samples: the continuations of a sample stand together.
        """
        num, num_samples = rows.shape[0], written.memories[0].offsets.numel() - 1
        one_each = torch.arange(num + 1, device=rows.device)
        together = torch.arange(num_samples + 1, device=rows.device) * (num // max(num_samples, 1))
        last = self.positions.table.shape[0] - 1
        rows = rows + self.positions.table[min(written.num_written, last)]
        past = []
        for number, (block, memory) in enumerate(zip(self.decoder, written.memories, strict=True)):
            before = written.past[number] if written.past else None
            rows, kept = block.extend(rows, one_each, before, memory=memory, memory_offsets=together)  # type: ignore[operator]
            past.append(kept)
        scores = self.norm(rows).float() @ written.words.T
        return scores.log_softmax(1), written._replace(past=tuple(past), num_written=written.num_written + 1)

    @torch.no_grad()
    def write(self, batch: "Batch", *, max_items: int, num_beams: int = 1, distinct: bool = False) -> Beams:
        """Return the num_beams most probable continuations that beam search finds for each sample.

        Args:
            batch: the features of the history.
            max_items: T, most items of a continuation.
            num_beams: K; 1 takes the most probable item at each step.
            distinct: whether an item may come only once in a continuation.

        Raises:
            ConfigError: max_items or num_beams is below 1.
        """
        check_widths("Seq2Seq.write", max_items, num_beams)
        end, size = len(self.head.catalogue), batch.num_samples
        log_prob, written = self.begin(batch)
        total = log_prob.new_full((size, num_beams), -torch.inf)
        total[:, 0] = 0.0  # one beam at first: equal ones would stay equal
        log_prob = log_prob.repeat_interleave(num_beams, dim=0)
        written = _picked(written, torch.arange(size).repeat_interleave(num_beams))
        done = torch.zeros(size, num_beams, dtype=torch.bool)
        places = torch.full((size, num_beams, max_items), end)
        for step in range(max_items):
            if distinct and step > 0:
                log_prob = log_prob.scatter(1, places[..., :step].flatten(0, 1), -torch.inf)
            total, beam, word = _grown(total, log_prob.view(size, num_beams, -1), done, end)
            chosen = (torch.arange(size)[:, None] * num_beams + beam).flatten()
            places, done = places.flatten(0, 1)[chosen].view_as(places), done.flatten()[chosen].view_as(done)
            places[..., step] = torch.where(done, end, word)
            done = done | (word == end)
            if step + 1 == max_items or bool(done.all()):
                break
            rows = written.words[word.flatten()]  # of a done one the end's, which is not read
            log_prob, written = self.extend(rows, _picked(written, chosen))
        ids = self.head.catalogue.sorted_ids[places.clamp(max=end - 1)]
        return Beams(ids, (places != end).sum(2), total)


def _picked(written: Written, continuations: Tensor) -> Written:
    return written._replace(past=tuple(memory.select(continuations) for memory in written.past))


def _grown(total: Tensor, log_prob: Tensor, done: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log p [B, K], old beam, word) of the K best continuations one word longer; done ones stay as they are."""
    num_beams, num_words = log_prob.shape[1:]
    nothing = torch.full_like(log_prob, -torch.inf)
    nothing[..., end] = 0.0
    grown = total[..., None] + torch.where(done[..., None], nothing, log_prob)
    best = grown.flatten(1).topk(num_beams, dim=1)
    return best.values, best.indices // num_words, best.indices % num_words


def synthetic() -> Seq2SeqConfig:
    """Return a small seq2seq for `recis.models.synthetic_sequences.SyntheticSequences`: seconds on a laptop."""
    return Seq2SeqConfig(
        tables=sequence_tables(16),
        source=ITEM,
        following=NEXT,
        catalogue=sequence_catalogue,
        num_layers=1,
        hidden=32,
        num_positions=32,
        dropout=0.0,
    )
