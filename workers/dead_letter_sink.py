"""Where a handler process keeps dead letters: the offset store's database, a topic, or both."""

from threading import Lock
from typing import TYPE_CHECKING

from kafkasrcd.errors import ConfigurationError, DeadLetterRefused
from kafkasrcd.settings import CommitStrategy, OnFailure, Settings
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, LetterState, Redelivered, StoredLetter
from kafkasrcd.storage.opening import open_dead_letters
from kafkasrcd.workers.dead_letter_topic import DeadLetterTopic

if TYPE_CHECKING:
    from kafkasrcd.storage.dead_letter_store import DeadLetterStore


class DeadLetterSink:
    """Nothing is opened before the first letter: most processes never have one."""

    def __init__(self, settings: Settings, store_url: str) -> None:
        self._settings = settings
        self._store_url = store_url
        # With on_checkpoint the database's part goes into the handler's transaction.
        self._in_transaction = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        self._to_topic = settings.handler.on_failure is OnFailure.DEAD_LETTER and bool(
            settings.handler.dead_letter_topic
        )
        self._produced: Redelivered | None = None
        self._store: DeadLetterStore | None = None
        self._topic: DeadLetterTopic | None = None
        self._one_at_a_time = Lock()

    def keep(self, letter: DeadLetter) -> None:
        """Returns once every place has it; blocks up to their timeouts.

        Raises StoreUnavailable or DeadLetterRefused where one does not take it now. The store first: there a letter
        that is kept again is still one, and in the topic it would be one more with each attempt.
        """
        is_dead = letter.due_ms is None
        with self._one_at_a_time:
            if not self._in_transaction and (self._settings.handler.dead_letter_store or not is_dead):
                self._opened().bury(letter)
            if is_dead and self._to_topic:
                self._produce(letter)

    def find(self, letter_id: int) -> StoredLetter | None:
        """The letter as the store has it; blocks. Raises StoreUnavailable."""
        with self._one_at_a_time:
            return next(self._opened().find(LetterFilter(ids=(letter_id,))), None)

    def settle(self, redelivered: Redelivered) -> bool:
        """Write down what became of a letter whose record was handled again; blocks.

        Returns and raises as ``DeadLetterStore.settle``, and DeadLetterRefused. The topic first: afterwards the store
        may know nothing of the letter any more. What is settled again, the store having been away, is not produced
        again.
        """
        failed = redelivered.failed
        with self._one_at_a_time:
            if (
                self._to_topic
                and redelivered.seen.state is LetterState.RETRYING
                and failed is not None
                and failed.due_ms is None
                and self._produced is not redelivered
            ):
                self._produce(failed)
                self._produced = redelivered
            return self._in_transaction or self._opened().settle(redelivered)

    def _produce(self, letter: DeadLetter) -> None:
        if self._topic is None:
            self._topic = DeadLetterTopic(self._settings)
        try:
            self._topic.produce(letter)
        except DeadLetterRefused:
            self._topic = None  # an idempotent producer that has lost a record may be of no more use
            raise

    def _opened(self) -> "DeadLetterStore":
        if self._store is None:
            settings = self._settings
            try:
                self._store = open_dead_letters(self._store_url, settings.group_id, settings.store.busy_timeout_ms)
            except ConfigurationError as error:  # it was right when the daemon started
                raise DeadLetterRefused(str(error)) from error
        return self._store
