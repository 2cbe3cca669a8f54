"""``manual``: a record is done when the handler has committed it, and every record before it."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from kafkasrcd.message import Message, commit_through
from kafkasrcd.workers.commits import Commits
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink
from kafkasrcd.workers.prefix import Prefix
from kafkasrcd.workers.ring import COMMITTABLE


class ManualCommits(Commits):
    """What ``message.commit()`` moves. May be called from any thread of the handler process, at any time later.

    A commit of a message that was read under an earlier assignment counts as well, where its record has been read
    again since: the handler says that it is done with it. Otherwise it changes nothing.
    """

    def __init__(self, letters: DeadLetterSink, bell: int) -> None:
        """``bell`` wakes the runner, which gives the space of what was committed back to the worker."""
        super().__init__(letters)
        self._bell = bell
        self._lock = threading.Lock()
        self._uncommitted: dict[tuple[str, int], tuple[PartitionCursor, Prefix]] = {}
        commit_through(self.commit)

    def commit(self, message: Message[Any]) -> None:
        """Does not wait: the supervisor records it within its next turn."""
        with self._lock:
            found = self._uncommitted.get((message.topic, message.partition))
            moved = found is not None and self._finish(*found, message.offset)
        if moved:
            os.eventfd_write(self._bell, 1)

    def loaded(self, cursor: PartitionCursor, offsets: Sequence[int]) -> None:
        with self._lock:
            entry = self._uncommitted.setdefault((cursor.topic, cursor.partition), (cursor, Prefix()))
            entry[1].load(offsets)

    def given_up(self, cursor: PartitionCursor, offset: int) -> None:
        with self._lock:
            self._finish(*self._uncommitted[cursor.topic, cursor.partition], offset)

    def closed(self, cursor: PartitionCursor) -> None:
        with self._lock:
            found = self._uncommitted.get((cursor.topic, cursor.partition))
            if found is not None and found[0] is cursor:  # and not its successor, which was bound before this went
                del self._uncommitted[cursor.topic, cursor.partition]

    @staticmethod
    def _finish(cursor: PartitionCursor, uncommitted: Prefix, offset: int) -> bool:
        moved = uncommitted.finish(offset)
        if moved is not None:
            cursor.cells[COMMITTABLE] = moved
        return moved is not None
