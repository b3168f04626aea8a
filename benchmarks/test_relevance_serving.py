"""Labels from the prompt alone against generating the answer and parsing its label.

    make bench, or: pytest benchmarks/test_relevance_serving.py --benchmark-json=out.json

The tiny model of the offline default (6 layers, hidden 256), 8 items per query. Peers: `model.generate` of 48 greedy tokens,
one request at a time (what the target of 20x means) and 64 at a time, and prefill without a shared prefix. Times are of one
batch of 64 pairs; the one-by-one peer is timed on one of them, so its ratio stands for 64 times as much.
"""

import pytest
import torch
from tiny_lm import load_micro, small_task  # pyright: ignore[reportMissingImports]  # tests/tiny_lm.py

from recis.bench.harness import compare
from relevance.oracle import oracle
from relevance.prefill import score_prompts
from relevance.rollouts import SamplingConfig, sample_completions
from relevance.tiny import ModelConfig, make_tiny

PAIRS, ALONE = 64, 1
TOKENS = 48


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    task = small_task()
    texts = [task.prompt(pair) + oracle(pair, task.profile) for pair in task.train]
    return load_micro(make_tiny(tmp_path_factory.mktemp("lm"), texts, ModelConfig(), rule_ids=task.rule_ids))  # type: ignore[arg-type]


def test_score(benchmark, lm):
    task = small_task()
    pairs = [*task.train, *task.dev][:PAIRS]
    prompts, groups = [task.prompt(pair) for pair in pairs], [pair.query_id for pair in pairs]
    shared = score_prompts(lm, prompts, groups)
    torch.testing.assert_close(shared, score_prompts(lm, prompts), rtol=1e-4, atol=1e-5)
    torch.set_num_threads(2)

    def generate(rows: list[str], batch_rows: int) -> None:
        lm.model.generation_config.min_new_tokens = TOKENS  # a fresh model may stop early
        config = SamplingConfig(temperature=0.0, max_completion_tokens=TOKENS, batch_rows=batch_rows)
        sample_completions(lm, rows, config=config)

    impls = {
        "shared prefix": lambda: score_prompts(lm, prompts, groups),
        "no shared prefix": lambda: score_prompts(lm, prompts),
        f"generate, batch 1 ({ALONE} of {PAIRS})": lambda: generate(prompts[:ALONE], 1),
        f"generate, batch {PAIRS}": lambda: generate(prompts, PAIRS),
    }
    compare(
        benchmark,
        case=f"{PAIRS} pairs",
        ours="shared prefix",
        impls=impls,
        items=PAIRS,
        rounds=4,
        targets={f"generate, batch 1 ({ALONE} of {PAIRS})": 20 * ALONE / PAIRS},
    )
