"""Features of a ranker: dense columns of a batch, and the pool as a layer trained with embeddings of ids."""

import numpy as np
import pytest
import torch
from torch import nn

from recis.ebrm import EBRM, EBRMConfig, EBRMFeatures, EntitySchema, Item, QEScorer, SoftLogicPool, TypeConfig
from recis.ebrm.soft_logic import relevance_loss
from recis.embedding import EmbeddingBagCollection, Feature, TableConfig
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.optim import Adagrad, SparseOptimizer

SCHEMA = EntitySchema(types=(TypeConfig(name="brand"), TypeConfig(name="colour")))
LOGITS = {"brand:lg": 3.0, "brand:aeg": -12.0, "brand:none": -1.0, "colour:red": 1.0, "colour:none": 2.0}


def model_of() -> EBRM:
    table = {(query, name): logit for query in ("lg", "lg red") for name, logit in LOGITS.items()}
    return EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(table))


ITEMS = [
    Item(id="a", entities=(SCHEMA.entity("brand", "lg"), SCHEMA.entity("colour", "red"))),
    Item(id="b", entities=(SCHEMA.entity("brand", "aeg"),)),
    Item(id="c"),
]


def empty_batch(num_samples: int) -> Batch:
    lengths = torch.ones(num_samples, dtype=torch.int64)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({"id": JaggedTensor(torch.arange(num_samples), lengths=lengths)}),
        dense=torch.arange(num_samples, dtype=torch.float32)[:, None],
        dense_keys=("price",),
        dense_widths=(1,),
        labels=torch.zeros(num_samples, 1),
        label_mask=None,
        label_weights=None,
        weights=torch.ones(num_samples),
        group_ids=None,
        extras={},
        num_samples=num_samples,
    )


def test_columns_of_a_batch():
    features = EBRMFeatures(model_of())
    assert features.keys == ("ebrm_r", "ebrm_log_r", "ebrm_log_g_brand", "ebrm_log_g_colour", "ebrm_approximate")
    queries, items = ["lg", "lg red", "lg", " "], [*ITEMS, ITEMS[0]]
    batch = features.extend(empty_batch(4), queries, items)
    assert batch.dense.shape == (4, 6)
    assert batch.dense_feature("price").flatten().tolist() == [0, 1, 2, 3]
    s = 1 / (1 + np.exp([-3.0, -1.0, 12.0, -2.0, 1.0]))
    want = [s[0] * s[1], s[2] * s[3], s[4] * s[3], 0.0]
    assert batch.dense_feature("ebrm_r").flatten().tolist() == pytest.approx(want, abs=1e-6)
    assert batch.dense_feature("ebrm_log_r").flatten().tolist() == pytest.approx([*np.log(want[:3]), -20.0], abs=1e-5)
    assert batch.dense_feature("ebrm_log_g_brand").flatten().tolist() == pytest.approx(
        [*np.log(s[[0, 2, 4]]), -20.0], abs=1e-5
    )
    assert batch.dense_feature("ebrm_approximate").flatten().tolist() == [0, 0, 1, 0]
    named = features.named_columns(queries, items)
    assert torch.equal(named["ebrm_r"], batch.dense_feature("ebrm_r").flatten())
    with pytest.raises(ConfigError, match="already"):
        features.extend(batch, queries, items)
    with pytest.raises(ValueError, match="as many queries"):
        features.extend(empty_batch(3), queries, items)


class IdRanker(nn.Module):
    """Logits of (query, entity) from products of embedding rows, pooled by soft logic: no encoder, all learned from clicks."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            TableConfig(name=name, features=(Feature(name),), embedding_dim=8, optimizer=Adagrad(lr=0.1))
            for name in ("query", "entity")
        ]
        self.embeddings = EmbeddingBagCollection(tables, seed=1)
        self.pool = SoftLogicPool(("brand", "colour"))

    def forward(self, query_ids, entity_ids, query_of, type_ids, slot_offsets, item_offsets):
        ones = torch.ones(len(entity_ids), dtype=torch.int64)
        inputs = {
            "query": JaggedTensor(query_ids[query_of], lengths=ones),
            "entity": JaggedTensor(entity_ids, lengths=ones),
        }
        rows = self.embeddings(KeyedJaggedTensor.from_jagged(inputs))
        logits = (rows["query"] * rows["entity"]).sum(1) * 30
        return self.pool(logits, type_ids, slot_offsets, item_offsets)


def test_the_pool_trains_inside_a_model_with_embedding_rows():
    """Four queries, each wants one brand and one colour; every item of 4 brands x 3 colours is labelled."""
    brands, colours, queries = 4, 3, 4
    pairs = [(q, b, c) for q in range(queries) for b in range(brands) for c in range(colours)]
    query_ids = torch.arange(queries)
    entity_ids = torch.tensor([entity for _, b, c in pairs for entity in (b, 100 + c)])
    query_of = torch.tensor([q for q, _, _ in pairs]).repeat_interleave(2)
    type_ids = torch.tensor([0, 1]).repeat(len(pairs))
    slot_offsets, item_offsets = torch.arange(2 * len(pairs) + 1), torch.arange(0, 2 * len(pairs) + 1, 2)
    labels = torch.tensor([float(b == q and c == q % colours) for q, b, c in pairs])
    model = IdRanker()
    args = (query_ids, entity_ids, query_of, type_ids, slot_offsets, item_offsets)
    rows = SparseOptimizer(model)
    dense = torch.optim.Adam(model.pool.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = relevance_loss(model(*args).log_r, labels).mean()
        losses.append(loss.item())
        rows.zero_grad()
        dense.zero_grad()
        loss.backward()
        rows.step()
        dense.step()
    model.pool.project_()
    r = model(*args).r
    assert losses[-1] < 0.1 * losses[0]
    assert r[labels > 0].min() > r[labels == 0].max()
    assert bool(((model.pool.relaxation >= 0) & (model.pool.relaxation <= 1)).all())
