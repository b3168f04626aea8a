"""Real PriceRunner pairs: scores with the cache are those without it, and warm ones those that were cold.

A table's logits come back bit for bit. An encoder's differ by fp16 and by the padding of the batches they were encoded in.
"""

import hashlib

import numpy as np
import pytest
import torch

from recis.ebrm import EBRM, EBRMConfig, QEScorer
from recis.ebrm.datasets import task_eval
from recis.ebrm.pairs import QIPairs
from recis.ebrm.runs import schema_of

ENCODER_TOLERANCE = 0.02
ENCODER_QUERIES = 12


@pytest.fixture(scope="module")
def pairs(pricerunner_task) -> QIPairs:
    return task_eval(pricerunner_task, pricerunner_task.parts["test"]).pairs


def distinct_pairs(model: EBRM, pairs: QIPairs) -> list[tuple[str, str]]:
    """Return every (query, entity) pair that the pairs ask for, once."""
    return list(
        dict.fromkeys(
            (pairs.queries[query], entity)
            for query, rows in pairs.by_query()
            for entity in model.pack([pairs.items[place] for place in pairs.item[rows]]).distinct
        )
    )


def scores_of(model: EBRM, pairs: QIPairs) -> tuple[np.ndarray, int]:
    """Return log r [P] by one request a query, in order of the queries, and the encoder calls of all."""
    parts, calls = [], 0
    for query, rows in pairs.by_query():
        scores = model.score(pairs.queries[query], [pairs.items[place] for place in pairs.item[rows]])
        parts.append(scores.log_r)
        calls += scores.encoder_calls
    return np.concatenate(parts), calls


def cached_logits(model: EBRM, pairs: QIPairs) -> dict[tuple[str, str], float]:
    found = {}
    for query, rows in pairs.by_query():
        packed = model.pack([pairs.items[place] for place in pairs.item[rows]])
        logits, stand_ins = model.entity_logits(pairs.queries[query], packed)
        assert not stand_ins.any()
        found.update(zip(((pairs.queries[query], name) for name in packed.distinct), logits.tolist(), strict=True))
    return found


def made_up_logit(pair: tuple[str, str]) -> float:
    """Return a number in +-11 that fp16 holds exactly."""
    return int.from_bytes(hashlib.blake2b("|".join(pair).encode(), digest_size=1).digest()) / 16 * 1.375 - 11


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
def test_a_table_comes_back_bit_for_bit(pricerunner_task, pairs, tmp_path, fast):
    config = EBRMConfig(schema=schema_of(pricerunner_task.schema, fast=fast))
    asked = distinct_pairs(EBRM(config, QEScorer.table({}, default=0.0)), pairs)
    scorer = QEScorer.table({pair: made_up_logit(pair) for pair in asked})
    model = EBRM(config, scorer)
    compared = sum(
        config.schema.types[config.schema.position(pair[1].split(":")[0])].scorer == "comparator" for pair in asked
    )
    assert (compared > 0) == fast
    model.open_cache(tmp_path / "cache")
    cold, calls = scores_of(model, pairs)
    assert calls == len(asked) - compared == scorer.calls
    warm, calls = scores_of(model, pairs)
    assert (calls, scorer.calls) == (0, len(asked) - compared)
    assert warm.tobytes() == cold.tobytes()
    model.cache.flush()
    again = EBRM(config, QEScorer.table(scorer.pairs))
    again.open_cache(tmp_path / "cache")
    kept, calls = scores_of(again, pairs)
    assert calls == 0
    assert kept.tobytes() == cold.tobytes()
    with torch.inference_mode():
        direct = model.qe_logits(asked).tolist()
    cached = cached_logits(again, pairs)
    assert [cached[pair] for pair in asked] == direct  # comparators' logits are exact in fp16 too, as they start
    alone = EBRM(config, QEScorer.table(scorer.pairs))  # a model that never saw a request, for each request
    uncached = []
    for query, rows in list(pairs.by_query())[:50]:
        alone.cache.clear(alone.version)
        uncached.append(alone.score(pairs.queries[query], [pairs.items[place] for place in pairs.item[rows]]).log_r)
    assert np.concatenate(uncached).tobytes() == cold[: sum(map(len, uncached))].tobytes()


def test_an_encoder_is_within_the_tolerance_and_warm_is_cold_bit_for_bit(pricerunner_task, pairs):
    few = pairs.first_queries(ENCODER_QUERIES)
    titles = [pairs.items[place].title for place in np.unique(few.item)]
    scorer = QEScorer.small([*titles, *few.queries[:ENCODER_QUERIES]])
    asked = distinct_pairs(EBRM(EBRMConfig(schema=pricerunner_task.schema), scorer), few)

    def logits() -> torch.Tensor:
        return torch.cat([scorer.forward(asked[first : first + 512]) for first in range(0, len(asked), 512)])

    with torch.no_grad():  # fresh weights say nearly the same to all; a trained head does not
        head = scorer.eval().get_submodule("head")
        head.get_parameter("weight").mul_(120)
        head.get_parameter("bias").sub_(logits().mean())
        one_batch = logits().numpy()
    model = EBRM(EBRMConfig(schema=pricerunner_task.schema), scorer)
    assert np.std(one_batch) > 0.3
    cold, calls = scores_of(model, few)
    assert calls == len(asked)
    cached = cached_logits(model, few)
    differences = np.abs([cached[pair] for pair in asked] - one_batch)
    assert differences.max() <= ENCODER_TOLERANCE
    warm, calls = scores_of(model, few)
    assert calls == 0
    assert warm.tobytes() == cold.tobytes()
    places = np.concatenate([rows for _, rows in few.by_query()])
    with torch.inference_mode():
        live = model.forward(
            [few.queries[place] for place in few.query[places]], [few.items[place] for place in few.item[places]]
        )
    # log r adds up a dozen logits, each within the tolerance
    np.testing.assert_allclose(cold, live.log_r.numpy(), atol=12 * ENCODER_TOLERANCE)
