"""Bearer tokens of an OAuth 2 client (RFC 6749, 4.4): fetched when a registry is to be asked, and kept for a while.

By each worker for itself: one asks the registry for a schema, all others find it on the host, so a token in a file
would save next to nothing.
"""

import base64
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import msgspec

from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers.http_client import FAILURES, HttpClient, body_of, shown_url, words_of
from kafkasrcd.workers.schema_document import RegistryAway

_LIFE: Final = 0.8
"""How much of its life a token is used for, as by confluent-kafka's client."""


class _Token(msgspec.Struct, frozen=True):
    access_token: str
    expires_in: float | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: str = ""
    error_description: str = ""


class ClientCredentials:
    """What ``bearer_client_id`` and ``bearer_client_secret`` get from ``bearer_issuer_endpoint_url``."""

    def __init__(self, settings: SchemaRegistrySettings, base_directory: Path) -> None:
        self.url = settings.bearer_issuer_endpoint_url
        self._settings = settings
        self._base_directory = base_directory
        self._http = HttpClient(settings.timeout_ms / 1000, self._tls)
        self._token = ""
        self._use_until = 0.0

    @property
    def has_token(self) -> bool:
        """Whether ``token`` has one without asking."""
        return bool(self._token) and time.monotonic() < self._use_until

    def token(self) -> str:
        """Blocks where it asks. Raises RegistryAway where it is given none: a reason to wait, as for the registry."""
        if not self.has_token:
            asked = time.monotonic()
            fetched = self._fetch()
            self._token = fetched.access_token
            # Without a life it is used until the registry refuses it.
            self._use_until = float("inf") if fetched.expires_in is None else asked + _LIFE * fetched.expires_in
        return self._token

    def forget(self) -> None:
        """The registry refused it."""
        self._token = ""

    def _fetch(self) -> _Token:
        settings = self._settings
        where = f"the token endpoint {shown_url(self.url)}"
        form = {"grant_type": "client_credentials"}
        if settings.bearer_scope:
            form["scope"] = settings.bearer_scope
        # As they are, and not percent-encoded first, as other clients of Kafka's have it, too: what works there works.
        pair = base64.b64encode(f"{settings.bearer_client_id}:{settings.bearer_client_secret}".encode()).decode()
        request = urllib.request.Request(self.url, urlencode(form).encode(), {"Accept": "application/json"})  # noqa: S310 - checked: http(s)
        request.add_unredirected_header("Authorization", f"Basic {pair}")
        try:
            found = msgspec.json.decode(self._http.ask(request), type=_Token, strict=False)
        except urllib.error.HTTPError as error:
            with error:
                said = _said(body_of(error))
            hint = "; check schema_registry.bearer_client_id, bearer_client_secret and bearer_scope"
            raise RegistryAway(f"{where} answers {error.code} {error.reason}{said}{hint}") from None
        except msgspec.MsgspecError:
            raise RegistryAway(f"{where} answers with something that is no token") from None
        except FAILURES as error:
            raise RegistryAway(f"{where}: {words_of(error)}") from None
        if not found.access_token.isascii() or not found.access_token.isprintable():
            raise RegistryAway(f"{where} answers with a token that fits no header")
        return found

    def _tls(self) -> ssl.SSLContext:
        """The system's certificates, and ``ca_location``'s: often it is another's host than the registry."""
        context = ssl.create_default_context()
        if self._settings.ca_location:
            context.load_verify_locations(str(self._base_directory / self._settings.ca_location))
        return context


def _said(content: bytes) -> str:
    try:
        refusal = msgspec.json.decode(content, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    words = ": ".join(word for word in (refusal.error, refusal.error_description) if word)
    return f" ({words})" if words else ""
