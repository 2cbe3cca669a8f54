"""HTTP as far as a registry and an identity provider need it: one request, a bounded answer, and nobody else asked."""

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

FAILURES: Final = (OSError, http.client.HTTPException, ValueError)
"""What ``HttpClient.ask`` raises."""
_LARGEST_BYTES: Final = 16 * 1024 * 1024


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is asked carries a password, which is not for whoever the answer points to."""

    def redirect_request(self, *_args: Any, **_named: Any) -> None:
        return None


class HttpClient:
    """``tls`` is called with the first request, and may raise OSError."""

    def __init__(self, timeout_seconds: float, tls: Callable[[], ssl.SSLContext]) -> None:
        self._timeout_seconds = timeout_seconds
        self._tls = tls
        self._opener: urllib.request.OpenerDirector | None = None

    def ask(self, request: urllib.request.Request) -> bytes:
        """The answer's body; blocks for the timeout. Raises HTTPError for a refusal, other FAILURES for no answer."""
        if self._opener is None:
            self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=self._tls()), _NoRedirects())
        with self._opener.open(request, timeout=self._timeout_seconds) as response:
            content: bytes = response.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise ValueError(f"an answer of more than {_LARGEST_BYTES} bytes")
        return content


def words_of(error: Exception) -> str:
    """Why there was no answer."""
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__


def body_of(refusal: urllib.error.HTTPError) -> bytes:
    """What came along with a refusal; empty where it cannot be read."""
    try:
        return refusal.read(65_536)
    except FAILURES:
        return b""


def shown_url(url: str) -> str:
    """Without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
