"""A tiny training task that tests of both stages share: six items, six queries, and a scorer of a few numbers."""

import numpy as np
import torch
from torch import nn

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, QEScorer, TypeConfig
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.pairs import QIPairs
from recis.ebrm.train import QIConfig

SCHEMA = EntitySchema(
    types=(TypeConfig(name="category", hard=True), TypeConfig(name="brand"), TypeConfig(name="model", kind="code"))
)


class Bilinear(QEScorer):
    """Stands in for an encoder: z = u[query] . v[entity] with hashed rows, in milliseconds."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.u = nn.Parameter(torch.randn(64, 8, generator=generator, dtype=dtype) * 0.5)
        self.v = nn.Parameter(torch.randn(64, 8, generator=generator, dtype=dtype) * 0.5)
        self.dropout = nn.Dropout(0.1)
        self.asked: list[list[tuple[str, str]]] = []

    def forward(self, pairs):
        self.asked.append(list(pairs))
        rows = [[sum(map(ord, text)) % 64 for text in pair] for pair in pairs]
        places = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
        return (self.dropout(self.u[places[:, 0]]) * self.v[places[:, 1]]).sum(1)


def items() -> tuple[Item, ...]:
    return tuple(
        Item(id=f"{c}{b}", entities=(SCHEMA.entity("category", c), SCHEMA.entity("brand", b)))
        for c in ("tv", "fridge")
        for b in ("smeg", "lg", "sony")
    )


def pairs_of(queries: tuple[str, ...]) -> QIPairs:
    """All queries x all items; relevant where all words of the query are values of the item."""
    own = items()
    places = [(q, i) for q in range(len(queries)) for i in range(len(own))]
    label = [float(set(queries[q].split()) <= {e.value for e in own[i].entities}) for q, i in places]
    query, item = np.array(places).T
    return QIPairs(queries=queries, items=own, query=query, item=item, label=np.array(label, np.float32))


QUERIES = ("smeg fridge", "lg tv", "sony tv", "lg fridge", "tv", "fridge")
ROWS = [
    QERow(query="smeg fridge", entity="brand:smeg", y=1, src="mention"),
    QERow(query="smeg fridge", entity="brand:lg", y=0, src="mention"),
    QERow(query="lg tv", entity="brand:lg", y=1, w=0.5, src="clicks"),
    QERow(query="tv", entity="brand:none", y=1, w=0.5, src="mention"),
]
CONFIG = QIConfig(epochs=4, lr=0.05, batch_pairs=8, qe_batch_pairs=2, eval_every_steps=3)


def model_of(seed: int = 0, schema: EntitySchema = SCHEMA) -> EBRM:
    return EBRM(EBRMConfig(schema=schema), Bilinear(seed))
