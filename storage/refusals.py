"""Why a store did not record an offset: the same words from every implementation."""

from kafkasrcd.errors import OffsetWentBackwards, StaleAssignment, StoreError, StoreUnavailable
from kafkasrcd.storage.offset_store import Advance, StoredOffset


class Conflict(StoreUnavailable):
    """Another transaction was in the way (a deadlock, a failed serialization): rolled back, and worth another attempt
    at once. Nothing is the matter with the store."""


def refusal(asked: Advance, stored: StoredOffset | None, *, has_slot: bool = True) -> StoreError:
    """The error for ``asked``, which was not recorded because of ``stored``, or because there is no such slot."""
    what = f"{asked.topic_partition}: next_offset {asked.next_offset} of assignment epoch {asked.assignment_epoch}"
    if stored is None:
        return StaleAssignment(
            f"{what} is not recorded: nobody has claimed the partition in this store; claim it first"
        )
    if stored.assignment_epoch != asked.assignment_epoch:
        return StaleAssignment(
            f"{what} is not recorded: {stored.owner} claimed the partition at assignment epoch "
            f"{stored.assignment_epoch}, where next_offset is {stored.next_offset}; stop this partition here"
        )
    if not has_slot:
        return StaleAssignment(
            f"{what} is not recorded: the partition was not claimed with slot {asked.slot} of {asked.layout.slots} by "
            f"{asked.layout.ordering}; stop this partition here"
        )
    return OffsetWentBackwards(
        f"{what} is not recorded: its owner {stored.owner} already recorded next_offset {stored.next_offset} "
        "in the same epoch; to read records again, seek"
    )
