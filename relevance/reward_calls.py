"""Call a reward function of the user's own so that it cannot stop a run without a word.

    r = call_reward("clicks", clicks, parsed, pairs, timeout_s=30.0)        [B] float64

A function that raises, hangs or returns something else than one number per completion is named in the error, with the
step's way out. NaN is legal: the row is left out of its group's baseline and gets advantage 0; infinity is not.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recis.errors import RecisError
from relevance.data import Pair
from relevance.labels import Parsed

RewardFunction = Callable[[Sequence[Parsed], Sequence[Pair]], Tensor]
"""(parsed, pairs) -> rewards [B]; NaN = unscorable."""


class RewardError(RecisError, RuntimeError):
    """A reward function raised, hung, or returned something that is no reward."""


def call_reward(
    name: str, function: RewardFunction, parsed: Sequence[Parsed], pairs: Sequence[Pair], *, timeout_s: float = 60.0
) -> Tensor:
    """Return the rewards of a function, [B] float64.

    It runs in a thread of its own. Python cannot stop a thread: after the time limit the error is raised and the thread is
    left behind, as a daemon that does not hold up the end of the process.

    Raises:
        RewardError: it raised (the cause is chained), took longer than timeout_s, returned another shape, or infinity.
    """
    answer: list[Tensor] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(torch.as_tensor(function(parsed, pairs)))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    shown = ", ".join(pair.id for pair in pairs[:3]) + (", .." if len(pairs) > 3 else "")
    if failure:
        error = failure[0]
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error}; on pairs {shown}: return NaN for what it cannot score"
        ) from error
    if not answer:
        raise RewardError(
            f"reward {name!r} gave no answer within {timeout_s} s on pairs {shown}: raise its time limit or fix it"
        )
    if answer[0].shape != (len(pairs),):
        raise RewardError(
            f"reward {name!r} must return [{len(pairs)}], one number per completion; got {tuple(answer[0].shape)}"
        )
    rewards = answer[0].detach().to(torch.float64)
    if bool(rewards.isinf().any()):
        worst = pairs[int(rewards.isinf().nonzero()[0])].id
        raise RewardError(
            f"reward {name!r} is infinite for pair {worst}: rewards are finite, or NaN for what it cannot score"
        )
    return rewards
