"""The contiguous prefix of records that are finished in any order."""

from collections import deque
from collections.abc import Iterable


class Prefix:
    """Offsets as the ring has them, and which of them are finished.

    Not thread-safe. What is finished beyond the first unfinished record moves nothing: after a crash it is done again.
    """

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._finished: set[int] = set()

    def load(self, offsets: Iterable[int]) -> None:
        """These come next, in this order, each higher than all before it."""
        self._waiting.extend(offsets)

    def finish(self, offset: int) -> int | None:
        """``offset`` is finished: the next offset after the prefix where that moved it, else None.

        One that is not waiting (finished before, or of no record) changes nothing.
        """
        waiting = self._waiting
        if not waiting or not waiting[0] <= offset <= waiting[-1]:
            return None
        if offset != waiting[0]:
            self._finished.add(offset)
            return None
        waiting.popleft()
        finished = self._finished
        while finished and waiting and waiting[0] in finished:
            offset = waiting.popleft()
            finished.remove(offset)
        return offset + 1

    @property
    def oldest(self) -> int | None:
        """The first offset that is not finished."""
        return self._waiting[0] if self._waiting else None

    def __len__(self) -> int:
        """How many are waiting, finished beyond the prefix or not."""
        return len(self._waiting)

    @property
    def unfinished(self) -> int:
        """How many are not finished."""
        return len(self._waiting) - len(self._finished)

    def clear(self) -> None:
        """Nothing is loaded any more."""
        self._waiting.clear()
        self._finished.clear()
