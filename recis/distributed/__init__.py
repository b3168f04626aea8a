"""One run over several processes: who owns which id, how rows and gradients travel, how a job starts, fails and ends."""

from recis.distributed.config import Parallel
from recis.distributed.ranks import RankError, Ranks

__all__ = ["Parallel", "RankError", "Ranks"]
