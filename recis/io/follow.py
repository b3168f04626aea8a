"""Watch paths for new files: each complete one is read once, in the order it was found.

A *round* is all files that a look at the paths finds complete and not yet read, sorted by path. The reader reads a round to
its end, then looks again. A file is complete when `<file>.done` stands beside it, or when two looks at least `stable_s`
apart saw the same size. Files of no bytes are waited for. What was read is remembered by path: a file that changes later
is not read again, one that is removed after its round is not missed.
"""

from collections.abc import Callable, Iterable

from recis.io.config import DataConfig, Follow
from recis.io.files import File, resolve

DONE_SUFFIX = ".done"


class Watcher:
    """Finds the rounds of a watched set of paths.

    Args:
        config: with `follow` set.
        clock: seconds that only grow.
        sleep: waits for some seconds; returns True when waiting is over for good.
    """

    def __init__(self, config: DataConfig, *, clock: Callable[[], float], sleep: Callable[[float], bool]) -> None:
        assert config.follow is not None
        self._config = config
        self._follow: Follow = config.follow
        self._clock = clock
        self._sleep = sleep
        self._consumed: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}  # url -> (size, since when it has had it)

    @property
    def consumed(self) -> list[str]:
        """Files that were read to their end, sorted."""
        return sorted(self._consumed)

    def consume(self, urls: Iterable[str]) -> None:
        """Note that these files were read to their end."""
        self._consumed.update(urls)

    def restore(self, consumed: Iterable[str]) -> None:
        """Take over what another watcher had read."""
        self._consumed = set(consumed)
        self._seen.clear()

    def wait(self) -> list[File]:
        """Return the next round; empty when `stop_after_idle_s` has passed without one, or waiting was ended."""
        begin = self._clock()
        while not (found := self.look()):
            idle = self._clock() - begin
            limit = self._follow.stop_after_idle_s
            if limit is not None and idle >= limit:
                return []
            if self._sleep(self._follow.poll_s if limit is None else min(self._follow.poll_s, limit - idle)):
                return []
        return found

    def look(self) -> list[File]:
        """Return the complete files that were not read yet, sorted by path; does not wait."""
        present = resolve(self._config.paths, self._config.format, missing_ok=True)
        new = [file for file in present if file.url not in self._consumed and not file.url.endswith(DONE_SUFFIX)]
        return [file for file in new if file.size > 0 and self._is_complete(file)]

    def _is_complete(self, file: File) -> bool:
        if self._follow.closed == "done":
            return bool(file.filesystem.exists(file.path + DONE_SUFFIX))
        now = self._clock()
        size, since = self._seen.setdefault(file.url, (file.size, now))
        if size != file.size:
            self._seen[file.url] = (file.size, now)
            return False
        return now - since >= self._follow.stable_s
