"""The handler process: runs the user's function over the records of the partitions bound to it."""

import asyncio
import faulthandler
import gc
import sys
from pathlib import Path
from typing import Any

import msgspec

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.workers import concurrent_runner, event_log, sync_runner
from kafkasrcd.workers.commits import Commits, refuse_message_commits
from kafkasrcd.workers.control import STACKS_SIGNAL, ControlChannel, HandlerReady, HandlerRefused, Setup
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.handler_bindings import HandlerBindings
from kafkasrcd.workers.handler_target import load_targets
from kafkasrcd.workers.kafka_settings import session_timeout_ms
from kafkasrcd.workers.manual_commits import ManualCommits
from kafkasrcd.workers.redelivery import Redeliveries


def main(channel: ControlChannel) -> int:
    """Serve until told to end; returns the exit code."""
    received = channel.receive()
    if received is None:
        return 0
    setup, descriptors = received
    if not isinstance(setup, Setup):
        raise TypeError(f"a handler process was told {setup!r} first")
    settings = msgspec.json.decode(setup.settings, type=Settings)
    output: Any = sys.stdout
    output.reconfigure(line_buffering=True)  # what a handler prints is seen when it prints it
    event_log.configure(settings.supervisor.log_format, settings.supervisor.log_level)
    try:
        in_transactions = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        targets = load_targets(
            settings.handler, Path(setup.base_directory), in_transactions=in_transactions, formats=Formats(settings)
        )
    except ConfigurationError as error:
        channel.send(HandlerRefused(str(error)))
        return 78
    channel.send(HandlerReady(tuple(targets.shapes())))
    # What was imported stays: the collector need not walk it again, and its pages stay shared.
    gc.collect()
    gc.freeze()
    again = Redeliveries(settings, Path(setup.base_directory), setup.schema_directory)
    bindings = HandlerBindings(settings, targets, channel, descriptors[0], again)
    stacks = descriptors[1]
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    bindings.commits = commits_of(settings, bindings, setup.store_url)
    if bindings.has_async or settings.handler.threads > 1:
        asyncio.run(concurrent_runner.run(bindings, settings))
    else:
        sync_runner.run(bindings)
    return 0


def commits_of(settings: Settings, bindings: HandlerBindings, store_url: str) -> Commits:
    """What ``commit_strategy`` does in this process."""
    strategy = settings.commit_strategy
    letters = DeadLetterSink(settings, store_url)
    if strategy is CommitStrategy.MANUAL:
        return ManualCommits(letters, bindings.bell)
    refuse_message_commits(strategy)
    if strategy is not CommitStrategy.ON_CHECKPOINT:
        return Commits(letters)
    # Here, so that handlers of the other strategies do not load SQLAlchemy (0.2 s, 20 MB).
    idle_seconds = session_timeout_ms(settings) / 1000
    where = (store_url, settings.group_id, settings.store.busy_timeout_ms, idle_seconds)
    from kafkasrcd.workers.checkpoint import AsyncCheckpoints, PlainCheckpoints

    if bindings.has_async:
        from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction

        return AsyncCheckpoints(settings, bindings, AsyncEffectsTransaction(*where), letters)
    from kafkasrcd.storage.transaction import EffectsTransaction

    return PlainCheckpoints(settings, bindings, EffectsTransaction(*where), letters)
