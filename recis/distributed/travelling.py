"""A collective that was started and not yet waited for: what it fills, and who is told when another rank is lost."""

import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from recis.distributed.timeline import Timeline


class Job(Protocol):
    """What a journey needs of Ranks."""

    timeline: Timeline
    link_delay_s: float

    def named(self, what: str) -> AbstractContextManager[None]:
        """Turn a failure inside into a RankError that names the collective."""
        ...


class Travelling:
    """A tensor that a collective is still filling.

    Args:
        job: the ranks.
        taken: what is being filled.
        work: the collective; None: it is there.
        what: name of the collective.
        given: what is sent; kept until it has been.
    """

    def __init__(self, job: Job, taken: Tensor, work: Any, what: str, given: Tensor | None = None) -> None:
        self._job, self._taken, self._work, self._what, self._given = job, taken, work, what, given
        self._begun = time.time()

    def wait(self) -> Tensor:
        """Return the filled tensor.

        Raises:
            RankError: another rank failed, was lost or did not answer in time.
        """
        if self._work is not None:
            waited_from = time.time()
            with self._job.named(self._what):
                self._work.wait()
            self._work = self._given = None
            if self._job.link_delay_s:
                time.sleep(max(0.0, self._begun + self._job.link_delay_s - time.time()))
            self._job.timeline.travelled(self._what, self._begun, waited_from)
        return self._taken
