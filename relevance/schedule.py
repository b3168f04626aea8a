"""Which prompt is trained on at which step, decided before training.

    prompt_order(ids, num_prompts=1600, seed=0)         seeded permutations, one after another, cut to the number
    staged_order(pools, stages, num_steps=200, prompts_per_step=8, seed=0)

The order is a function of its arguments alone, so restarts and ranks agree on it. Ours.
"""

from collections.abc import Sequence

import numpy as np

from recis.errors import DataError
from relevance.curriculum import Stage, stage_at


def prompt_order(ids: Sequence[str], *, num_prompts: int, seed: int) -> list[str]:
    """Return num_prompts ids; each pass over all of them has its own permutation.

    Raises:
        DataError: there are no ids.
    """
    if not ids:
        raise DataError("no prompt is left to train on", option="widen the filter, or sample more prompts")
    order: list[str] = []
    epoch = 0
    while len(order) < num_prompts:
        permutation = np.random.Generator(np.random.Philox([seed, epoch])).permutation(len(ids)).tolist()
        order += [str(ids[int(place)]) for place in permutation]
        epoch += 1
    return order[:num_prompts]


def staged_order(
    pools: Sequence[Sequence[str]], stages: Sequence[Stage], *, num_steps: int, prompts_per_step: int, seed: int
) -> list[str]:
    """Return the ids of a curriculum: the steps of stage k take from pool k.

    Args:
        pools: ids per stage.
        stages: their shares of the steps.
        num_steps, prompts_per_step: of the run.
        seed: of the permutations.

    Raises:
        DataError: the pool of a stage that has steps is empty.
    """
    of_step = [stage_at(step, num_steps, stages) for step in range(num_steps)]
    taken = {
        number: prompt_order(pools[number], num_prompts=of_step.count(number) * prompts_per_step, seed=seed + number)
        for number in sorted(set(of_step))
    }
    places = dict.fromkeys(taken, 0)
    order = []
    for number in of_step:
        first = places[number]
        order.extend(taken[number][first : first + prompts_per_step])
        places[number] = first + prompts_per_step
    return order
