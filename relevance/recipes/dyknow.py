"""DyKnow-RAG (arXiv:2510.11122): half of the rollouts read the retrieved chunk, and each half teaches the other.

    J = l0 + l1 + lx - kl_coef KL        l0, l1 clipped GRPO of the halves without (p) and with (p') the chunk
    lx = mean_i mean_t pi(o0_i,t | p', o0_i,<t) T_i        T: see `two_groups`

The objective is the paper's as printed; which of two readings is taken where the text has both, the centered gate and the sizes
are ours. Prompts: a pool of uncertain ones, scored once by the frozen start model and kept in dyknow/pool.json. Serving shows
one chunk, in one pass.
"""

import json
from functools import partial
from pathlib import Path

from recis.errors import DataError
from relevance import ebrm_verifier
from relevance.checkpoints import write_json
from relevance.config import DyknowConfig, DyknowRun
from relevance.curriculum import pool_summary, uncertainty_pool
from relevance.engine import train_rl
from relevance.grader import RolloutJob
from relevance.language_model import LanguageModel
from relevance.methods import Method, outcome_reward, two_group_signal, two_groups_outside
from relevance.prefill import score_prompts
from relevance.ranks import main_first
from relevance.sampling import AccuracyRange
from relevance.schedule import prompt_order
from relevance.task import Task
from relevance.training_run import TrainingRun
from relevance.two_groups import Gate, centered_gate, fixed_gate, printed_gate


def train(run: TrainingRun[DyknowRun]) -> Path:
    """Train and return the folder of the finished model."""
    stage, config = run.stage("rl"), run.config
    if not stage.is_done:
        lm = run.start_model()
        task = run.task_of(lm)
        ids = _pool(run, lm, task)
        own = config.dyknow
        method = Method(
            reward=outcome_reward(),
            signal=two_group_signal(
                gate=_gate(own),
                is_gap_of_batch=own.is_gap_of_batch,
                ddof=config.rl.std_ddof,
                eps=config.rl.std_eps,
                limit=config.rl.advantage_clamp,
                transfer_limit=own.clamp_lx,
            ),
            is_dead=two_groups_outside(AccuracyRange(low=own.accuracy_low, high=own.accuracy_high, closed=True)),
            refill_rounds=config.rl.refill_rounds,
            has_two_prompts=True,
            lx_coef=own.lx_coef,
        )
        job = RolloutJob(
            task=task, method=method, lm=lm, reserve=tuple(ids), has_own_head=config.engine.own_head, state=stage.state
        )
        order = prompt_order(ids, num_prompts=config.rl.max_steps * config.rl.prompts_per_step, seed=config.seed)
        train_rl(job, order, config.rl, stage, kl_scale=0.5)  # TRL's mean over 2n rows is half of l0 + l1
    return run.finish(stage.final)


def _pool(run: TrainingRun[DyknowRun], lm: LanguageModel, task: Task) -> list[str]:
    """Return the ids of the prompts: rank 0 draws them once, other ranks and a run that goes on read them.

    Scores differ in their last bits between devices, and ranks with different prompts would train on different data.
    """
    config, path = run.config.dyknow, run.folder / "dyknow" / "pool.json"
    with main_first():
        if not path.exists():
            pairs = [pair for pair in task.train if pair.label is not None and pair.chunk is not None]
            if not pairs:
                raise DataError(
                    "no train pair has a chunk", column="chunk", option="give chunks, or use another recipe"
                )
            probs = score_prompts(lm, [task.prompt(pair) for pair in pairs], [pair.query_id for pair in pairs])
            gaps = None
            if config.ebrm_run is not None:
                gaps = ebrm_verifier.load_verifier(config.ebrm_run, pairs).disagreement(pairs, probs)
            pool = uncertainty_pool(pairs, probs, config=config.pool, disagreement=gaps, seed=run.config.seed)
            if not pool:
                raise DataError(
                    f"no pair belongs to the families {config.pool.families}",
                    column="family",
                    option="set dyknow.pool.families",
                )
            run.say(f"dyknow: pool of {len(pool)} prompts: {pool_summary(pairs, pool)}")
            write_json(path, {"ids": [pairs[place].id for place in pool]})
    return json.loads(path.read_text(encoding="utf-8"))["ids"]


def _gate(config: DyknowConfig) -> Gate:
    gates = {
        "printed": printed_gate,
        "centered": centered_gate,
        "fixed": partial(fixed_gate, alpha=config.fixed_alpha, beta=config.fixed_beta),
    }
    return gates[config.gate]


if __name__ == "__main__":
    import sys

    from relevance.cli import main

    raise SystemExit(main(["train", "dyknow", *sys.argv[1:]]))
