"""A client of schema registries that speak the Confluent API: as much of it as reading needs.

On the standard library: the client of confluent-kafka needs four more packages, takes a second to import, which each
worker would pay, and keeps what it has learnt in its own process.
"""

import base64
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers.client_credentials import ClientCredentials
from kafkasrcd.workers.http_client import FAILURES, HttpClient, body_of, shown_url, words_of
from kafkasrcd.workers.schema_document import NoSuchSchema, Reference, RegistryAway, SchemaDocument

_SCHEMA_NOT_FOUND: Final = 40403
_MOST_REFERENCES: Final = 1_000
_ACCEPT: Final = "application/vnd.schemaregistry.v1+json, application/json"


class _ReferenceTo(msgspec.Struct, frozen=True):
    name: str
    subject: str
    version: int


class _Answer(msgspec.Struct, frozen=True):
    schema: str
    schemaType: str = "AVRO"
    references: list[_ReferenceTo] | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error_code: int = 0
    message: str = ""


class SchemaRegistry:
    """Asks; remembers nothing. Files in ``settings`` are relative to ``base_directory``.

    Raises RegistryAway at the first question where certificates cannot be read.
    """

    def __init__(self, settings: SchemaRegistrySettings, base_directory: Path) -> None:
        self.urls = [url.strip().rstrip("/") for url in settings.url.split(",") if url.strip()]
        self.timeout_seconds = settings.timeout_ms / 1000
        self._settings = settings
        self._base_directory = base_directory
        self._credentials = ClientCredentials(settings, base_directory) if settings.bearer_issuer_endpoint_url else None
        self._http = HttpClient(self.timeout_seconds, self._tls)

    @property
    def name(self) -> str:
        """For messages: the addresses, without a password."""
        return ", ".join(shown_url(url) for url in self.urls)

    @property
    def _who(self) -> str:
        """The settings that say who asks."""
        if self._credentials is not None:
            return "bearer_scope, bearer_logical_cluster and bearer_identity_pool_id: it refuses the token it is shown"
        return "username and password, or bearer_token"

    def schema(self, number: int) -> SchemaDocument:
        """The schema of an id, with all that it refers to.

        Blocks for the timeout of each request at most. Raises NoSuchSchema, RegistryAway.
        """
        answer = self._ask(f"/schemas/ids/{number}", number)
        if answer.schemaType == "PROTOBUF":
            # As a descriptor, where the registry can: then nothing is to be compiled.
            answer = self._ask(f"/schemas/ids/{number}?format=serialized", number)
        found: dict[str, str] = {}
        self._resolve(answer.references or [], found, set())
        references = tuple(Reference(name, text) for name, text in found.items())
        return SchemaDocument(kind=answer.schemaType, text=answer.schema, references=references)

    def check(self) -> None:
        """Raises RegistryAway where none of the addresses answers as a registry does."""
        self._request("/schemas/types")

    def _resolve(self, references: list[_ReferenceTo], found: dict[str, str], under_way: set[str]) -> None:
        """Depth first, so that each comes after what it needs itself."""
        for reference in references:
            if reference.name in found or reference.name in under_way:
                continue
            if len(found) + len(under_way) >= _MOST_REFERENCES:
                raise RegistryAway(f"the registry at {self.name} gives more than {_MOST_REFERENCES} references")
            under_way.add(reference.name)
            subject = quote(reference.subject, safe="")
            answer = self._ask(f"/subjects/{subject}/versions/{reference.version}?format=serialized")
            self._resolve(answer.references or [], found, under_way)
            found[reference.name] = answer.schema

    def _ask(self, path: str, number: int | None = None) -> _Answer:
        content = self._request(path, number)
        try:
            return msgspec.json.decode(content, type=_Answer)
        except msgspec.MsgspecError:
            raise RegistryAway(f"the registry at {self.name} answers with something that is no schema") from None

    def _request(self, path: str, number: int | None = None) -> bytes:
        """From the first address that answers."""
        reasons: list[str] = []
        for url in self.urls:
            try:
                return self._get(url, path)
            except urllib.error.HTTPError as error:
                with error:
                    refusal = _refusal(body_of(error))
                if number is not None and error.code == 404 and refusal.error_code == _SCHEMA_NOT_FOUND:
                    raise NoSuchSchema(f"the registry at {self.name} has no schema {number}") from None
                hint = {
                    401: f"; check schema_registry.{self._who}",
                    403: "; these credentials may not read schemas",
                    404: "; check schema_registry.url",
                }.get(error.code, "")
                said = f" ({refusal.message})" if refusal.message else ""
                reasons.append(f"{shown_url(url)} answers {error.code} {error.reason}{said}{hint}")
            except FAILURES as error:
                reasons.append(f"{shown_url(url)}: {words_of(error)}")
        raise RegistryAway("; ".join(reasons))

    def _get(self, url: str, path: str) -> bytes:
        """A token that is refused may have been taken back: then, once, with a new one."""
        credentials = self._credentials
        if credentials is None:
            return self._get_with(url, path, self._settings.bearer_token)
        was_kept = credentials.has_token
        try:
            return self._get_with(url, path, credentials.token())
        except urllib.error.HTTPError as refusal:
            if refusal.code != 401:
                raise
            credentials.forget()
            if not was_kept:
                raise
            refusal.close()
        return self._get_with(url, path, credentials.token())

    def _get_with(self, url: str, path: str, token: str) -> bytes:
        parts = urlsplit(url)
        request = urllib.request.Request(shown_url(url) + path, headers={"Accept": _ACCEPT})  # noqa: S310 - checked: http(s)
        for name, value in self._authorization(token, parts.username, parts.password):
            request.add_unredirected_header(name, value)
        return self._http.ask(request)

    def _authorization(self, token: str, username: str | None, password: str | None) -> Iterator[tuple[str, str]]:
        settings = self._settings
        if token:
            yield "Authorization", f"Bearer {token}"
            if settings.bearer_logical_cluster:
                yield "target-sr-cluster", settings.bearer_logical_cluster
            if settings.bearer_identity_pool_id:
                yield "Confluent-Identity-Pool-Id", settings.bearer_identity_pool_id
            return
        if settings.username:
            username, password = settings.username, settings.password
        if username:
            pair = base64.b64encode(f"{username}:{password or ''}".encode()).decode()
            yield "Authorization", f"Basic {pair}"

    def _tls(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.create_default_context(cafile=self._path(settings.ca_location))
        if settings.certificate_location:
            context.load_cert_chain(
                self._path(settings.certificate_location) or "",
                self._path(settings.key_location),
                settings.key_password or "",
            )
        return context

    def _path(self, location: str) -> str | None:
        return str(self._base_directory / location) if location else None


def _refusal(content: bytes) -> _Refusal:
    try:
        return msgspec.json.decode(content, type=_Refusal)
    except msgspec.MsgspecError:
        return _Refusal()
