"""Rows of quality_ebrm that change what EBRM is: no logic at all, and the title as one more entity."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ebrm_tasks import QualityTask
from torch import Tensor, nn

from recis.ebrm.canonical import canonical_text
from recis.ebrm.entities import EntitySchema, Item, TypeConfig
from recis.ebrm.pairs import QIPairs
from recis.ebrm.pretrain import QETable, fit, merge_rows
from recis.ebrm.scorer import Pair, QEScorer

TITLE = "title"
MAX_TITLE_TOKENS = 64


class MeanOfLogits(nn.Module):
    """z(q, item) = a * mean of the logits of its entities, `none` ones included, + b: no slot, no veto, no product."""

    def __init__(self, scorer: QEScorer, schema: EntitySchema, items: Sequence[Item]) -> None:
        super().__init__()
        self.scorer = scorer
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self.entities = [[e.id for slot in schema.slots(item.entities) for e in slot] for item in items]

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P] of pairs (query, place of the item as text); each distinct (query, entity) is scored once."""
        places: dict[Pair, int] = {}
        own = [[places.setdefault((query, e), len(places)) for e in self.entities[int(item)]] for query, item in pairs]
        z = self.scorer(list(places)).float()
        flat = torch.tensor([place for row in own for place in row])
        row_of = torch.arange(len(own)).repeat_interleave(torch.tensor([len(row) for row in own]))
        sums = torch.zeros(len(own)).index_add(0, row_of, z[flat])
        return self.scale * sums / torch.bincount(row_of).float() + self.bias


def fit_mean_of_logits(task: QualityTask, seed: int, config: Any) -> MeanOfLogits:
    """Return the model after both stages; stage A is EBRM's."""
    pairs = task.data.train
    model = MeanOfLogits(task.scorer(seed), task.data.schema, pairs.items)
    fit(model.scorer, model.scorer, merge_rows(task.data.qe_rows), task.budget.pretraining(seed))
    table = QETable(
        pairs=tuple(_named(pairs)), y=pairs.label.astype(np.float32), w=np.ones(len(pairs), dtype=np.float32)
    )
    fit(model, model, table, config, small=[[model.scale, model.bias]])
    return model


@torch.inference_mode()
def mean_of_logits_scores(model: MeanOfLogits, task: QualityTask, pairs: QIPairs) -> np.ndarray:
    """Return logits [P] of a part."""
    scored = MeanOfLogits(model.scorer, task.data.schema, pairs.items).eval()
    scored.load_state_dict(model.state_dict())
    named, out = _named(pairs), np.empty(len(pairs))
    for _, rows in pairs.by_query():
        out[rows] = scored([named[row] for row in rows.tolist()]).double().numpy()
    return out


def _named(pairs: QIPairs) -> list[Pair]:
    queries = [canonical_text(text) for text in pairs.queries]
    return [(queries[q], str(i)) for q, i in zip(pairs.query.tolist(), pairs.item.tolist(), strict=True)]


def with_titles(task: QualityTask) -> QualityTask:
    """Return the task whose items have their title as an entity of a type of its own, which defeats the cache."""
    schema = EntitySchema(types=(*task.data.schema.types, TypeConfig(name=TITLE)))

    def told(pairs: QIPairs) -> QIPairs:
        items = tuple(
            replace(item, entities=(*item.entities, schema.entity(TITLE, item.title))) if item.title else item
            for item in pairs.items
        )
        return replace(pairs, items=items)

    data = replace(task.data, schema=schema, train=told(task.data.train), dev=told(task.data.dev))
    dev, test = (replace(part, pairs=told(part.pairs)) for part in (task.dev, task.test))
    return replace(task, data=data, dev=dev, test=test)
