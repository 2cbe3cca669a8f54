"""Whether the formats of the settings can work: their names, what they need, and the schemas in files."""

import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kafkasrcd.daemon.configuration_problem import Problem
from kafkasrcd.daemon.setting_fields import did_you_mean, shown
from kafkasrcd.daemon.topic_patterns import is_pattern, pattern_error, subscribes
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import FormatSettings, SchemaRegistrySettings, Settings
from kafkasrcd.workers.formats import CUSTOM_PREFIX, WITH_SCHEMA, Format, Formats, Kind, kind_of_format
from kafkasrcd.workers.redaction import hide_url_passwords

_SIDES = ("value", "key")


def check_names(settings: Settings) -> Iterator[Problem]:
    """What is wrong with the settings by themselves; looks at no file."""
    wrong = False
    rows = [("", getattr(settings, f"{side}_format"), f"{side}_format") for side in _SIDES]
    for topic, row in settings.formats.items():
        rows += [(topic, getattr(row, f"{side}_format"), f"formats.{topic}.{side}_format") for side in _SIDES]
        if is_pattern(topic):
            if reason := pattern_error(topic):
                wrong = True
                yield Problem(f"formats.{topic}", f"{shown(topic)} is not a regular expression: {reason}")
        elif not any(subscribes(each, topic, settings.supervisor.group_protocol) for each in settings.topics):
            text = f"the topic is not among topics{did_you_mean(topic, settings.topics)}"
            yield Problem(f"formats.{topic}", text, ("topics",))
    for topic, text, setting in rows:
        if text or not topic:
            for problem in _name(text, setting):
                wrong = True
                yield problem
    yield from _registry(settings.schema_registry)
    if wrong:
        return
    for topic, row in settings.formats.items():
        yield from _row(topic, row, settings)
    if settings.schema_registry.url:
        return
    for form in _used(settings):
        if form.needs_registry:
            side = form.setting.rpartition("_")[0]
            own = f"{side}_schema" if side.startswith("formats.") else f"{side}_schema in [formats.<topic>]"
            text = f"{form.kind.value} needs schema_registry.url, or a schema from a file in {own}"
            yield Problem(form.setting, text, ("schema_registry.url", "formats"))


def check_files(settings: Settings, base_directory: Path) -> Iterator[Problem]:
    """What is wrong with schemas and certificates in files, and with what is not installed.

    For settings that ``check_names`` has nothing against. Loads the libraries of the formats in use.
    """
    used = [form for form in _used(settings) if form.is_prepared]
    if settings.schema_registry.url:
        yield from _certificates(settings.schema_registry, base_directory)
    if not used:
        return
    from kafkasrcd.workers.preparing import check_form

    for form in used:
        try:
            check_form(form, base_directory)
        except ConfigurationError as error:
            setting, _, text = str(error).partition(": ")
            yield Problem(setting, text)


def _used(settings: Settings) -> Iterator[Format]:
    """Each format that some topic has, or may have."""
    formats = Formats(settings)
    named = [topic for topic in settings.topics if not is_pattern(topic)]
    certain = {form for topic in named for form in (formats.value(topic), formats.key(topic))}
    are_all_named = len(named) == len(settings.topics)
    default = {formats.value(""), formats.key("")}
    yield from dict.fromkeys(
        form for form in formats.all() if form in certain or form not in default or not are_all_named
    )


def _name(text: str, setting: str) -> Iterator[Problem]:
    kinds = [kind.value for kind in Kind if kind is not Kind.CUSTOM]
    try:
        kind, deserializer = kind_of_format(text)
    except ValueError:
        hint = did_you_mean(text, kinds) if text else ""
        allowed = f"one of {', '.join(kinds)}, or {CUSTOM_PREFIX}package.module:Class"
        yield Problem(setting, f"expected {allowed}, got {shown(text)}{hint}")
        return
    module, colon, name = deserializer.partition(":")
    if kind is Kind.CUSTOM and not (
        colon and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))
    ):
        yield Problem(setting, f"expected {CUSTOM_PREFIX}package.module:Class, got {shown(text)}")


def _row(topic: str, row: FormatSettings, settings: Settings) -> Iterator[Problem]:
    for side in _SIDES:
        text = getattr(row, f"{side}_format") or getattr(settings, f"{side}_format")
        kind, _ = kind_of_format(text)
        involves = (f"formats.{topic}.{side}_format", f"{side}_format")
        if getattr(row, f"{side}_schema") and kind not in WITH_SCHEMA:
            what = f"{side}_format {kind.value!r} has no schema"
            yield Problem(f"formats.{topic}.{side}_schema", what, involves)
        if getattr(row, f"{side}_reader_schema") and kind is not Kind.AVRO:
            what = f"is for {side}_format 'avro', not {kind.value!r}"
            yield Problem(f"formats.{topic}.{side}_reader_schema", what, involves)
        if getattr(row, f"{side}_message") and (kind is not Kind.PROTOBUF or not getattr(row, f"{side}_schema")):
            what = f"is for {side}_format 'protobuf' with a {side}_schema"
            yield Problem(f"formats.{topic}.{side}_message", what, involves)


def _registry(registry: SchemaRegistrySettings) -> Iterator[Problem]:
    for url in registry.url.split(",") if registry.url else ():
        if not _is_web_address(url.strip()):
            text = f"expected https://host:8081, got {hide_url_passwords(shown(url.strip()))}"
            yield Problem("schema_registry.url", text)
    yield from _bearer(registry)
    if registry.key_location and not registry.certificate_location:
        yield Problem("schema_registry.key_location", "is of the certificate; give certificate_location, too")


def _bearer(registry: SchemaRegistrySettings) -> Iterator[Problem]:
    token, issuer = "schema_registry.bearer_token", "schema_registry.bearer_issuer_endpoint_url"
    url = registry.bearer_issuer_endpoint_url
    if registry.bearer_token and registry.username:
        yield Problem(token, "is instead of username and password; give one of both")
    if not (registry.bearer_token.isascii() and registry.bearer_token.isprintable()):
        yield Problem(token, "has a line break, or what is no ASCII, in it: no header can carry that")
    if url and (registry.bearer_token or registry.username):
        other = "bearer_token" if registry.bearer_token else "username"
        yield Problem(issuer, f"is instead of {other}; give one of both", (f"schema_registry.{other}",))
    if url and not _is_web_address(url):
        yield Problem(issuer, f"expected https://host/token, got {hide_url_passwords(shown(url))}")
    for name in ("bearer_client_id", "bearer_client_secret"):
        if url and not getattr(registry, name):
            yield Problem(f"schema_registry.{name}", "is missing, for bearer_issuer_endpoint_url", (issuer,))
    if not url:
        for name in ("bearer_client_id", "bearer_client_secret", "bearer_scope"):
            if getattr(registry, name):
                yield Problem(f"schema_registry.{name}", "is for bearer_issuer_endpoint_url, which is not given")
        for name in ("bearer_logical_cluster", "bearer_identity_pool_id"):
            if getattr(registry, name) and not registry.bearer_token:
                yield Problem(f"schema_registry.{name}", "goes along with a token, and there is none")
    for name in ("bearer_logical_cluster", "bearer_identity_pool_id"):
        text = getattr(registry, name)
        if not (text.isascii() and text.isprintable()):
            yield Problem(f"schema_registry.{name}", f"no header can carry {shown(text)}")


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _certificates(registry: SchemaRegistrySettings, base_directory: Path) -> Iterator[Problem]:
    try:
        if registry.ca_location:
            ssl.create_default_context(cafile=str(base_directory / registry.ca_location))
    except OSError as error:
        text = f"{registry.ca_location} holds no certificates that can be read: {error.strerror or error}"
        yield Problem("schema_registry.ca_location", text)
    try:
        if registry.certificate_location:
            ssl.create_default_context().load_cert_chain(
                str(base_directory / registry.certificate_location),
                str(base_directory / registry.key_location) if registry.key_location else None,
                registry.key_password,
            )
    except OSError as error:
        text = f"certificate and key cannot be used: {error.strerror or error}; check key_location and key_password"
        yield Problem("schema_registry.certificate_location", text)
