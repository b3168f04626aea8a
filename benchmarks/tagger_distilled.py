"""The distilled tagger for benchmarks/quality_tagger.py: at most ten seed words a type, unlabelled train queries.

    seed words -> rules -> pool -> words spread over MiniLM's vectors, in the loop -> soft labels -> MiniLM + CRF

Of dev gold only the share of each type is used, as the threshold of each type's log-probability; and dev chose between
the few settings that the results file lists. The test part is tagged by the first seed's model only.
"""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tagger_queryner import merged, minilm, queries, score, told
from tagger_seed_words import CORE, ENDS_HEAD, JOINING, SEED_WORDS

from recis.tagger.distil import DistilConfig, distil
from recis.tagger.neural import NeuralConfig, TaggerModel
from recis.tagger.rules import RuleTagger, surface_rule
from recis.tagger.spread import SpreadConfig, WordSpreader
from recis.tagger.text import WORDS
from recis.tagger.train import Example, train

LOOP = DistilConfig(precision_floor=0.8, max_rounds=1, top_k=60, max_span_tokens=3, kinds=("surface", "prev", "next"))
SPREAD = SpreadConfig(joining=JOINING, head_type=CORE, ends_head=ENDS_HEAD, epochs=8, bf16=True)
NEURAL = NeuralConfig(epochs=2, lr=1e-4, average=0.99, bf16=True)


def distilled(data: Path, seed: int) -> dict[str, Any]:
    """Return the figures of one run: seed words only, rules, spread words, and the neural tagger taught by them."""
    began = time.perf_counter()
    rows, dev = queries(data, "train"), queries(data, "dev")
    test = queries(data, "test") if seed == 0 else []
    types = sorted(SEED_WORDS)
    shares = Counter(name for row in dev for start, end, name in row.spans for _ in range(end - start))
    share_of = {name: shares[name] / shares.total() for name in types}
    texts = [row.text for row in rows]
    with torch.autocast("cpu", torch.bfloat16):
        spreader = WordSpreader(
            [row.text for row in (*rows, *dev, *test)], types, share_of, minilm(), replace(SPREAD, seed=seed)
        )
    rules = [surface_rule(name, word) for name, words in SEED_WORDS.items() for word in words.split()]
    ids = [str(number) for number in range(len(rows))]
    result = distil(texts, ids, types, rules, replace(LOOP, seed=seed), tokenizer=WORDS, tagger=spreader)
    seeded = {word: name for name, words in SEED_WORDS.items() for word in words.split()}
    by_rules = RuleTagger(result.rules)
    run: dict[str, Any] = {
        "dev seed words only": told(score(dev, [merged(row.text.tokens, seeded, None) for row in dev])),
        "dev rules only": told(score(dev, [by_rules.tag_text(row.text) for row in dev])),
        "dev words spread": told(score(dev, spreader.predict([row.text for row in dev]))),
        "rules": len(result.rules.rules),
        "pool": len(result.pool),
        "stop": result.stop,
    }
    print(f"spread {run['dev words spread']['micro_f1']}, {time.perf_counter() - began:.0f} s", flush=True)
    model = TaggerModel(types, replace(NEURAL, encoder=minilm(), seed=seed), tokenizer=WORDS)
    train(
        model,
        [Example(text, spreader.soft_labels(text, model.tags)) for text in texts if text.tokens],
        on_epoch=lambda epoch, loss, value: print(f"epoch {epoch}: loss {loss:.3f}", flush=True),
    )
    run["dev"] = told(score(dev, model.tag_texts([row.text for row in dev])))
    if test:
        run["test"] = told(score(test, model.tag_texts([row.text for row in test])))
    return run


def seed_list() -> dict[str, Any]:
    """Return what the results file says of the seeds."""
    return {
        "seed_words": SEED_WORDS,
        "chosen": "by reading the unlabelled train queries, not their labels",
        "joining": sorted(JOINING),
        "ends_head": sorted(ENDS_HEAD),
    }
