"""Has librdkafka check its own settings, since only it knows them all: by creating clients that are never used.

Such a client has no brokers, so it connects to nothing, and it is closed, threads and all, before this returns. One
takes about a millisecond, ten where certificates are read.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from kafkasrcd.daemon.configuration_problem import Problem
from kafkasrcd.daemon.librdkafka_names import CONSUMER_SETTINGS
from kafkasrcd.daemon.setting_fields import did_you_mean, shown
from kafkasrcd.settings import Settings
from kafkasrcd.workers.kafka_settings import KafkaConfig, member_config, protected_reason, worker_config
from kafkasrcd.workers.redaction import HIDDEN, hide_url_passwords, is_secret

_CREATION = "Failed to create consumer: "  # with this, the client was refused as a whole; without, one setting
_UNKNOWN = "No such configuration property"
_WARNING = re.compile(r"CONFWARN .*?\]: (?P<text>.*)")
_OF_PRODUCERS = "is a producer property"


class Answer(msgspec.Struct, frozen=True):
    """What librdkafka has against the settings; ``configuration_rules.Report`` has the meaning of both."""

    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


class _Verdict(msgspec.Struct, frozen=True):
    """librdkafka's words: why it refused a client (empty: it did not), and what it warned about."""

    refusal: str
    warnings: tuple[str, ...]


def check(settings: Settings, expressions: Sequence[str], *, whole_clients: bool) -> Answer:
    """Check each key of ``extra_config`` by itself, the expressions for topics, and what does not go together.

    ``expressions``: those in ``topics`` that are known to be regular expressions of Python's. ``whole_clients``: the
    settings are otherwise sound, so the member's client can be checked as a whole; the worker's does not depend on
    them. Protected keys are left out: they are reported elsewhere.
    """
    extra = {name: value for name, value in settings.extra_config.items() if protected_reason(name) is None}
    problems: list[Problem] = [problem for item in extra.items() for problem in _setting(*item)]
    problems += _expressions(expressions)
    warnings: dict[str, None] = {}  # a set that keeps its order
    if not problems:
        usable = msgspec.structs.replace(settings, extra_config=extra)
        configs = [worker_config(usable), *([member_config(usable)] if whole_clients else [])]
        for verdict in map(_ask, configs):
            if verdict.refusal:
                problem = _as_a_whole(verdict.refusal, extra)
                problems += [problem] if problem not in problems else []
            warnings |= dict.fromkeys(f"extra_config: {_without_secrets(text, extra)}" for text in verdict.warnings)
    return Answer(tuple(problems), tuple(warnings))


def _setting(name: str, value: str) -> Iterator[Problem]:
    """What is wrong with one setting. That it needs others is not: alone, it may be refused as a whole client."""
    verdict = _ask({name: value})
    setting = f"extra_config.{name}"
    if any(_OF_PRODUCERS in text for text in verdict.warnings):
        yield Problem(setting, "is a setting of producers and does nothing in a consumer")
    if not verdict.refusal or verdict.refusal.startswith(_CREATION):
        return
    if verdict.refusal.startswith(_UNKNOWN):
        yield Problem(setting, f"librdkafka has no such setting{did_you_mean(name, CONSUMER_SETTINGS)}")
    elif allowed := CONSUMER_SETTINGS.get(name):
        yield Problem(setting, f"expected {allowed}, got {HIDDEN if is_secret(name) else shown(value)}")
    else:
        yield Problem(setting, f"librdkafka refuses it: {_without_secrets(verdict.refusal, {name: value})}")


def _as_a_whole(refusal: str, extra: Mapping[str, str]) -> Problem:
    text = _without_secrets(refusal.removeprefix(_CREATION), extra)
    # Longest first, so that a name is not taken for another that contains it.
    named = next((name for name in sorted(extra, key=len, reverse=True) if name in refusal), None)
    return Problem(
        f"extra_config.{named}" if named else "extra_config",
        f"librdkafka refuses the settings together: {text}",
        ("extra_config", "supervisor", "topics"),
    )


def _expressions(expressions: Sequence[str]) -> Iterator[Problem]:
    """Regular expressions that Python takes and librdkafka does not: it has POSIX's extended ones."""
    from confluent_kafka import Consumer, KafkaException

    if not expressions:
        return
    consumer = Consumer({"group.id": "configuration-check"})
    try:
        for expression in expressions:
            try:
                consumer.subscribe([expression])
            except KafkaException:
                text = "is not a POSIX extended regular expression, as topics are matched by: (?…) is not known there"
                yield Problem("topics", f"{shown(expression)} {text}")
    finally:
        consumer.close()


def _ask(config: Mapping[str, str | int | float | bool]) -> _Verdict:
    """Create a client of ``config`` and close it."""
    from confluent_kafka import Consumer, KafkaException  # slow to import, and most commands never come here

    # With a group of nothing but spaces, which it strips, confluent-kafka aborts the process.
    asked: KafkaConfig = {**config, "group.id": "configuration-check"}
    asked.pop("bootstrap.servers", None)
    # With OIDC a client fetches a token as soon as it exists. Without SASL its settings are checked all the same.
    is_oidc = str(asked.get("sasl.oauthbearer.method")).lower() == "oidc"
    if is_oidc:
        asked["security.protocol"] = (
            "ssl" if str(asked.get("security.protocol")).lower().endswith("ssl") else "plaintext"
        )
    log = _Log()
    try:
        consumer = Consumer(asked, logger=log.logger)
    except KafkaException as error:
        return _Verdict(str(error.args[0].str()).strip(), ())
    except (TypeError, ValueError, AttributeError, SystemError) as error:  # refused by the Python binding
        return _Verdict(f"{_CREATION}{error}", ())
    consumer.poll(0)  # delivers what was logged
    consumer.close()
    return _Verdict("", () if is_oidc else tuple(log.warnings))


class _Log(logging.Handler):
    """Collects what librdkafka says of a configuration, and keeps the rest off the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self.logger = logging.Logger("kafkasrcd.librdkafka_check")
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if match := _WARNING.search(record.getMessage()):
            self.warnings.append(match["text"].strip())


def _without_secrets(text: str, extra: Mapping[str, str]) -> str:
    for name, value in extra.items():
        if value and is_secret(name):
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)
    return hide_url_passwords(text)
