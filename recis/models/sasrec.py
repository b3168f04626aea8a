"""SASRec: a causal transformer over a user's items, whose last state is the user.

    x_i = item vector + position row;  h = norm(blocks(dropout(x)));  score of item v after i items = <h_i, v>

Blocks are of the "pre" form (`recis.models.sequence_layers`), as in the paper: attention(norm(x)) is added to x. Two things are
ours: places count from the first item kept, so a later item changes nothing before it; and `NextItemConfig` puts a learned
row in front, so an empty history has a state too. Source: Kang and McAuley 2018, arXiv:1808.09781.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from recis.models.layers import check_widths
from recis.models.next_item import NextItemConfig
from recis.models.retrieval_head import FullSoftmax
from recis.models.sequence_layers import PositionEmbedding, TransformerBlock, check_dropout
from recis.models.synthetic_sequences import ITEM, sequence_catalogue, sequence_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class SasRec:
    """An encoder of sequences for NextItemConfig."""

    num_layers: int = 2
    num_heads: int = 1
    """Divides the width of the item vectors."""
    hidden: int | None = None
    """Width inside the feed-forward nets; None: that of the item vectors, as in the paper."""
    num_positions: int = 200
    """Places with a row of their own; later ones share the last."""
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_widths("SasRec", self.num_layers, self.num_heads, self.num_positions, self.hidden or 1)
        check_dropout("SasRec", self.dropout)

    def build(self, width: int) -> nn.Module:
        """Return the encoder of item vectors of that width, with fresh weights."""
        return SasRecEncoder(self, width)


class SasRecEncoder(nn.Module):
    """forward(rows [L, W], offsets [B + 1], times) -> [L, W]; row i has seen the rows up to i. Times are not read."""

    def __init__(self, config: SasRec, width: int) -> None:
        super().__init__()
        hidden = config.hidden or width
        self.positions = PositionEmbedding(width, config.num_positions)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, hidden, dropout=config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor, offsets: Tensor, times: Tensor | None = None) -> Tensor:
        rows = self.drop(self.positions(rows, offsets))
        for block in self.blocks:
            rows = block(rows, offsets, causal=True)
        return self.norm(rows)


def synthetic() -> NextItemConfig:
    """Return a small SASRec for `recis.models.synthetic_sequences.SyntheticSequences`: seconds on a laptop."""
    return NextItemConfig(
        tables=sequence_tables(16),
        history=ITEM,
        encoder=SasRec(num_layers=1, num_heads=2, num_positions=32, dropout=0.1),
        softmax=FullSoftmax(),
        catalogue=sequence_catalogue,
    )
