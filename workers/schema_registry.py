"""A client of schema registries that speak the Confluent API: as much of it as reading needs.

On the standard library: the client of confluent-kafka needs four more packages, takes a second to import, which each
worker would pay, and keeps what it has learnt in its own process.
"""

import base64
import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec

from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers.schema_document import NoSuchSchema, Reference, RegistryAway, SchemaDocument

_SCHEMA_NOT_FOUND: Final = 40403
_LARGEST_BYTES: Final = 16 * 1024 * 1024
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is asked carries a password, which is not for whoever the registry points to."""

    def redirect_request(self, *_args: Any, **_named: Any) -> None:
        return None


class SchemaRegistry:
    """Asks; remembers nothing. Files in ``settings`` are relative to ``base_directory``.

    Raises RegistryAway at the first question where certificates cannot be read.
    """

    def __init__(self, settings: SchemaRegistrySettings, base_directory: Path) -> None:
        self.urls = [url.strip().rstrip("/") for url in settings.url.split(",") if url.strip()]
        self.timeout_seconds = settings.timeout_ms / 1000
        self._settings = settings
        self._base_directory = base_directory
        self._opener: urllib.request.OpenerDirector | None = None

    @property
    def name(self) -> str:
        """For messages: the addresses, without a password."""
        return ", ".join(shown_url(url) for url in self.urls)

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
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise RegistryAway(f"the registry at {self.name} answers with something that is no schema") from None

    def _request(self, path: str, number: int | None = None) -> bytes:
        """From the first address that answers."""
        reasons: list[str] = []
        for url in self.urls:
            try:
                return self._get(url, path)
            except urllib.error.HTTPError as error:
                with error:
                    refusal = _refusal(error)
                if number is not None and error.code == 404 and refusal.error_code == _SCHEMA_NOT_FOUND:
                    raise NoSuchSchema(f"the registry at {self.name} has no schema {number}") from None
                hint = {
                    401: "; check schema_registry.username and password, or bearer_token",
                    403: "; these credentials may not read schemas",
                    404: "; check schema_registry.url",
                }.get(error.code, "")
                said = f" ({refusal.message})" if refusal.message else ""
                reasons.append(f"{shown_url(url)} answers {error.code} {error.reason}{said}{hint}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                reasons.append(f"{shown_url(url)}: {reason or type(error).__name__}")
        raise RegistryAway("; ".join(reasons))

    def _get(self, url: str, path: str) -> bytes:
        if self._opener is None:
            self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=self._tls()), _NoRedirects())
        parts = urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request = urllib.request.Request(bare + path, headers={"Accept": _ACCEPT})  # noqa: S310 - checked: http(s)
        if (authorization := self._authorization(parts.username, parts.password)) is not None:
            request.add_unredirected_header("Authorization", authorization)
        with self._opener.open(request, timeout=self.timeout_seconds) as response:
            content: bytes = response.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise ValueError(f"an answer of more than {_LARGEST_BYTES} bytes")
        return content

    def _authorization(self, username: str | None, password: str | None) -> str | None:
        settings = self._settings
        if settings.bearer_token:
            return f"Bearer {settings.bearer_token}"
        if settings.username:
            username, password = settings.username, settings.password
        if not username:
            return None
        return "Basic " + base64.b64encode(f"{username}:{password or ''}".encode()).decode()

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


def shown_url(url: str) -> str:
    """Without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _refusal(error: urllib.error.HTTPError) -> _Refusal:
    try:
        return msgspec.json.decode(error.read(65_536), type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError, http.client.HTTPException):
        return _Refusal()
