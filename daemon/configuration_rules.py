"""What a configuration must hold to besides the type of each setting: formats, and settings that go together."""

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec

from kafkasrcd.daemon import format_check, librdkafka_check
from kafkasrcd.daemon.configuration_problem import Problem
from kafkasrcd.daemon.setting_fields import did_you_mean, shown
from kafkasrcd.daemon.topic_patterns import is_pattern, pattern_error, subscribes
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import CommitStrategy, GroupProtocol, OnFailure, Ordering, Retry, Settings
from kafkasrcd.workers.kafka_settings import (
    heartbeat_interval_ms,
    max_poll_interval_ms,
    protected_reason,
    session_timeout_ms,
)
from kafkasrcd.workers.redaction import hide_url_passwords, is_secret

# What the broker allows for a topic and for a group.instance.id (org.apache.kafka.common.internals.Topic).
_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_BROKER = re.compile(
    r"(?:(?:plaintext|ssl|sasl_plaintext|sasl_ssl)://)?"
    r"(?:\[[0-9a-fA-F:.%\w]+\]|[a-zA-Z0-9](?:[a-zA-Z0-9._-]*[a-zA-Z0-9.])?)"
    r"(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LEAST_TIMEOUT_SECONDS = 60
"""Twice what a connection takes to be given up (25 s, and the lock_timeout)."""
_MOST_DIGITS = 18
"""What surely fits Kafka's offsets, of 63 bits."""

MAX_GROUP_ID_LENGTH = 249
"""The control socket, the client id and the store carry the name; the broker itself takes 32767."""


class Report(msgspec.Struct, frozen=True):
    """``problems`` make the configuration unusable; ``warnings`` are lines about what was probably not meant."""

    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


def check(settings: Settings) -> Report:
    """Everything wrong with settings that have the right types.

    Creates and closes librdkafka clients to have their settings checked, without connecting; some milliseconds.
    """
    problems = [
        *_brokers(settings),
        *_group(settings),
        *_topics(settings),
        *_handlers(settings),
        *_dead_letters(settings),
        *_strategy(settings),
        *_store(settings.store.url),
        *_protocol(settings),
        *_timeouts(settings),
        *_extra_config(settings),
        *format_check.check_names(settings),
    ]
    expressions = [topic for topic in settings.topics if is_pattern(topic) and pattern_error(topic) is None]
    answer = librdkafka_check.check(settings, expressions, whole_clients=not problems)
    return Report((*problems, *answer.problems), answer.warnings)


def validate(settings: Settings) -> None:
    """For settings built in a program. Raises ConfigurationError with one line for each problem."""
    if problems := check(settings).problems:
        raise ConfigurationError("\n".join(problem.line() for problem in problems))


def _brokers(settings: Settings) -> Iterator[Problem]:
    brokers = [broker.strip() for broker in settings.brokers.split(",")]
    if brokers == [""]:
        yield Problem("brokers", "missing; give host:port, or several separated by commas")
        return
    for broker in brokers:
        match = _BROKER.fullmatch(broker)
        if match is None:
            hint = "; an IPv6 address stands in brackets, as in [::1]:9092" if broker.count(":") > 2 else ""
            yield Problem("brokers", f"{hide_url_passwords(shown(broker))} is not host:port{hint}")
        elif match["port"] is not None and not 1 <= int(match["port"]) <= 65_535:
            yield Problem("brokers", f"{shown(broker)} has a port that is not from 1 to 65535")


def _group(settings: Settings) -> Iterator[Problem]:
    group_id = settings.group_id
    if not group_id.strip():
        yield Problem("group_id", "missing; name the consumer group")
    elif group_id != group_id.strip():
        yield Problem("group_id", f"{shown(group_id)} has a space at its end, which librdkafka would leave out")
    elif not group_id.isprintable() or "/" in group_id:
        yield Problem("group_id", f"{shown(group_id)} has a character that a group's name must not have ('/', control)")
    elif len(group_id.encode()) > MAX_GROUP_ID_LENGTH:
        yield Problem("group_id", f"longer than {MAX_GROUP_ID_LENGTH} bytes")
    instance = settings.supervisor.group_instance_id
    if instance and (not _LEGAL_NAME.fullmatch(instance) or instance in {".", ".."}):
        text = f"{shown(instance)} must be 1 to 249 letters, digits, '.', '_' or '-'"
        yield Problem("supervisor.group_instance_id", text)


def _topics(settings: Settings) -> Iterator[Problem]:
    if not settings.topics:
        yield Problem("topics", 'missing; list what to consume, as in topics = ["orders"]')
    for topic in settings.topics:
        yield from _topic("topics", topic, settings)
    doubles = {topic for topic in settings.topics if settings.topics.count(topic) > 1}
    for topic in sorted(doubles):
        yield Problem("topics", f"{shown(topic)} is given twice")


def _topic(setting: str, topic: str, settings: Settings) -> Iterator[Problem]:
    """What is wrong with a topic's name, or with a regular expression for topics."""
    if not is_pattern(topic):
        if not _LEGAL_NAME.fullmatch(topic) or topic in {".", ".."}:
            hint = "; a regular expression starts with ^" if re.search(r"[*+?|()\[\]$\\]", topic) else ""
            rule = "1 to 249 letters, digits, '.', '_' or '-'"
            yield Problem(setting, f"{shown(topic)} cannot be a topic's name ({rule}){hint}")
        return
    if reason := pattern_error(topic):
        yield Problem(setting, f"{shown(topic)} is not a regular expression: {reason}")
    elif setting == "topics" and re.search(r"(?<!\\)(\\\\)*\\[dD]", topic) and _is_classic(settings):
        # The group's topics are matched by POSIX expressions, to which \d is the letter d: nothing would ever match.
        yield Problem(setting, f"{shown(topic)}: \\d is not known here, write [0-9]", ("supervisor.group_protocol",))


def _handlers(settings: Settings) -> Iterator[Problem]:
    handler = settings.handler
    if handler.target:
        yield from _target("handler.target", handler.target)
    patterns = [key for key in handler.topics if is_pattern(key)]
    for key, target in handler.topics.items():
        name = f"handler.topics.{key}"
        yield from _target(name, target)
        wrong = list(_topic(name, key, settings))
        yield from wrong
        if (
            not wrong
            and not is_pattern(key)
            and not any(subscribes(topic, key, settings.supervisor.group_protocol) for topic in settings.topics)
        ):
            text = f"the topic is not among topics{did_you_mean(key, settings.topics)}"
            yield Problem(name, text, ("topics",))
    if handler.target:
        return
    involves = ("topics", "handler.topics")
    if not handler.topics:
        yield Problem("handler.target", "missing; name the function to call, as package.module:function", involves)
        return
    for topic in settings.topics:
        if topic in handler.topics or (not is_pattern(topic) and any(_matches(key, topic) for key in patterns)):
            continue
        what = f"a topic that matches {shown(topic)} may have" if is_pattern(topic) else f"{shown(topic)} has"
        yield Problem(
            "handler.target", f"missing, and {what} no handler; give it, or the topic in handler.topics", involves
        )


def _matches(pattern: str, topic: str) -> bool:
    """Whether a key of ``handler.topics`` takes in the topic: those are matched here, with either protocol alike."""
    return subscribes(pattern, topic, GroupProtocol.CLASSIC)


def _target(setting: str, target: str) -> Iterator[Problem]:
    module, colon, function = target.partition(":")
    parts = [*module.split("."), *function.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        hint = ""
        if not colon and target.count(".") and all(part.isidentifier() for part in target.split(".")):
            hint = f"; did you mean '{':'.join(target.rsplit('.', 1))}'?"
        yield Problem(setting, f"expected package.module:function, got {shown(target)}{hint}")


def _dead_letters(settings: Settings) -> Iterator[Problem]:
    handler = settings.handler
    topic = handler.dead_letter_topic
    if topic:
        name = topic.replace("{topic}", "x")
        if not _LEGAL_NAME.fullmatch(name) or name in {".", ".."}:
            rule = "1 to 249 letters, digits, '.', '_' or '-', and {topic} for the record's topic"
            yield Problem("handler.dead_letter_topic", f"{shown(topic)} cannot be a topic's name ({rule})")
        elif any(subscribes(each, topic, settings.supervisor.group_protocol) for each in settings.topics):
            text = f"{shown(topic)} is among topics: dead letters would be consumed, and fail, again"
            yield Problem("handler.dead_letter_topic", text, ("topics",))
    if handler.retry is Retry.SCHEDULED and settings.store.url == "memory://":
        text = "'scheduled' puts records aside in the offset store, and memory:// keeps none: name a database"
        yield Problem("handler.retry", text, ("store.url",))
    if handler.retry is Retry.SCHEDULED and handler.on_failure is OnFailure.STOP:
        text = "with 'scheduled' the partition has long gone on when the last attempt fails: set on_failure dead_letter"
        yield Problem("handler.retry", text, ("handler.on_failure",))
    if handler.on_failure is OnFailure.DEAD_LETTER and not topic and not handler.dead_letter_store:
        text = "'dead_letter' has no place for them: leave dead_letter_store true, or name a dead_letter_topic"
        yield Problem("handler.on_failure", text, ("handler.dead_letter_store", "handler.dead_letter_topic"))
    if handler.max_dead_letter_ratio < 1 and handler.on_failure is not OnFailure.DEAD_LETTER:
        text = f"there are no dead letters where handler.on_failure is {shown(handler.on_failure)}"
        yield Problem("handler.max_dead_letter_ratio", text, ("handler.on_failure",))


def _strategy(settings: Settings) -> Iterator[Problem]:
    handler = settings.handler
    if settings.commit_strategy is CommitStrategy.ON_CHECKPOINT:
        involves = ("commit_strategy",)
        if settings.store.url == "memory://":
            text = "with commit_strategy 'on_checkpoint' it is the database of the handler's effects, not memory://"
            yield Problem("store.url", text, involves)
        if 0 < handler.timeout_seconds < _LEAST_TIMEOUT_SECONDS:
            text = (
                f"with commit_strategy 'on_checkpoint' at least {_LEAST_TIMEOUT_SECONDS}: a call may wait so long for "
                "a database that does not answer, and its record would be blamed"
            )
            yield Problem("handler.timeout_seconds", text, involves)
        if handler.threads > 1:
            text = "with commit_strategy 'on_checkpoint' at most 1: a transaction runs one statement at a time"
            yield Problem("handler.threads", text, involves)
    if handler.ordering is not Ordering.PARTITION:
        # Imported here: it brings confluent_kafka along, and what only looks for the daemon never comes here.
        from kafkasrcd.workers.spread import MOST_SLOTS

        processes = handler.processes or len(os.sched_getaffinity(0))
        if processes > MOST_SLOTS:
            what = str(processes) if handler.processes else f"unset, and {processes}, one for each core,"
            text = f"{what} is above {MOST_SLOTS}, the most with ordering '{handler.ordering.value}'"
            yield Problem("handler.processes", text, ("handler.ordering",))
    yield from _start_from(settings.start_from)


def _start_from(text: str) -> Iterator[Problem]:
    kind, _, value = text.partition(":")
    allowed = "earliest, latest, offset:1000 or timestamp:2026-01-31T12:00:00+00:00"
    if text in ("", "earliest", "latest"):
        return
    if kind == "offset" and value.isascii() and value.isdecimal() and len(value) <= _MOST_DIGITS:
        return
    if kind != "timestamp":
        yield Problem("start_from", f"expected {allowed}, got {shown(text)}")
        return
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        yield Problem("start_from", f"{shown(value)} is not a time as in timestamp:2026-01-31T12:00:00+00:00")
        return
    if at.tzinfo is None:
        yield Problem("start_from", f"{shown(value)} has no time zone: end it with Z, or as in +01:00")
    elif at < _EPOCH:
        # To Kafka -1 and -2, a millisecond or two before, are the end and the beginning.
        yield Problem("start_from", f"{shown(value)} is before 1970, where Kafka's times begin; for all, earliest")


def _store(url: str) -> Iterator[Problem]:
    allowed = "sqlite:///path, postgresql://user@host/database or memory://"
    if not url or url == "memory://":
        return
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.partition("+")[0]
    except ValueError:
        parts, scheme = urlsplit(""), ""
    if scheme == "memory":
        yield Problem("store.url", "expected memory:// and nothing after it")
    elif parts.scheme in ("postgresql", "postgresql+psycopg") and url.startswith(f"{parts.scheme}://"):
        yield from _postgresql(parts)
    elif not url.startswith("sqlite://"):
        # Neither a space nor a query: what is hidden is the password between a colon and an @.
        without = re.sub(r"\s", "%20", url.partition("?")[0])
        text = f"expected {allowed}, got {hide_url_passwords(shown(without))}"
        yield Problem("store.url", f"{text}{did_you_mean(scheme, ['sqlite', 'postgresql', 'memory'])}")
    elif not url.startswith("sqlite:///") or url in {"sqlite:///", "sqlite:///:memory:"}:
        text = "needs a path after three slashes, as in sqlite:////var/lib/kafkasrcd/offsets.db"
        yield Problem("store.url", f"{text}; for one that is not kept, memory://")


def _postgresql(parts: SplitResult) -> Iterator[Problem]:
    if re.search(r"\s", parts.geturl()):
        yield Problem("store.url", "has a space in it: write %20")
        return
    if not parts.path.strip("/"):
        yield Problem("store.url", "names no database, as in postgresql://user@host/database")
    try:
        _ = parts.port
    except ValueError:
        yield Problem(
            "store.url", "has a port that is not from 0 to 65535; in a password write %3A for : and %2F for /"
        )
    secrets = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if is_secret(name)})
    if secrets:
        # It would be shown: by `config show`, in errors, and in every log that has the URL.
        text = f"{' and '.join(map(shown, secrets))} after the '?' would be shown"
        yield Problem("store.url", f"{text}; write postgresql://user:password@host/database, where it is hidden")


def _protocol(settings: Settings) -> Iterator[Problem]:
    if _is_classic(settings):
        return
    for name in ("session_timeout_ms", "heartbeat_interval_ms", "partition_assignment_strategy"):
        if getattr(settings.supervisor, name) is not None:
            where = "with KIP-848 the broker sets it (group.consumer.*)"
            if name == "partition_assignment_strategy":
                where = "with KIP-848 the broker assigns; extra_config 'group.remote.assignor' chooses how"
            text = f"cannot be set with group_protocol 'consumer': {where}"
            yield Problem(f"supervisor.{name}", text, ("supervisor.group_protocol",))


def _timeouts(settings: Settings) -> Iterator[Problem]:
    supervisor = settings.supervisor
    session_ms = session_timeout_ms(settings)
    heartbeat_ms = heartbeat_interval_ms(settings)
    session = "supervisor.session_timeout_ms"
    unset = " (its default)" if supervisor.session_timeout_ms is None else ""
    if supervisor.lease_seconds * 1_000 >= session_ms:
        text = (
            f"{supervisor.lease_seconds:g} s must be below the session timeout, {session_ms / 1_000:g} s{unset}: "
            "otherwise processes go on with partitions that the group has given to others"
        )
        yield Problem("supervisor.lease_seconds", text, (session, "supervisor.group_protocol"))
    if _is_classic(settings) and heartbeat_ms * 3 > session_ms:
        text = (
            f"{heartbeat_ms} must be at most a third of the session timeout, {session_ms}{unset}: "
            "otherwise one lost heartbeat can cost the membership"
        )
        yield Problem("supervisor.heartbeat_interval_ms", text, (session, "supervisor.group_protocol"))
    if settings.retry_backoff_ms > settings.retry_backoff_max_ms:
        text = f"{settings.retry_backoff_ms} is above retry_backoff_max_ms, {settings.retry_backoff_max_ms}"
        yield Problem("retry_backoff_ms", text, ("retry_backoff_max_ms",))


def _extra_config(settings: Settings) -> Iterator[Problem]:
    for name in settings.extra_config:
        if reason := protected_reason(name):
            yield Problem(f"extra_config.{name}", f"cannot be set: {reason}")
    # A revocation keeps the member from polling; with less time than that it would leave the group in every one.
    given = settings.extra_config.get("max.poll.interval.ms", "")
    least = max_poll_interval_ms(settings)
    if given.isdecimal() and int(given) < least:
        yield Problem(
            "extra_config.max.poll.interval.ms",
            f"{given} is below {least}, which the session timeout or a revocation needs "
            "(supervisor.drain_timeout_seconds and 40 s for commits)",
            ("supervisor.drain_timeout_seconds", "supervisor.session_timeout_ms"),
        )


def _is_classic(settings: Settings) -> bool:
    return settings.supervisor.group_protocol is GroupProtocol.CLASSIC
