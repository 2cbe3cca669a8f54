"""An identity provider for tests: gives tokens for client credentials (RFC 6749, 4.4), each another one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


class TokenServer:
    """`answer`: a status and a body to answer with instead. `expires_in`: what it says of its tokens."""

    def __init__(self, authorization: str, expires_in: Any = 3_600) -> None:
        self.asked: list[dict[str, list[str]]] = []
        """The forms."""
        self.answer: tuple[int, bytes] | None = None
        self.expires_in = expires_in
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                server.asked.append(parse_qs(form))
                status, body = server.answer or server.granted(self.headers.get("Authorization") == authorization)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called above
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "TokenServer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def granted(self, is_known: bool) -> tuple[int, bytes]:
        """The usual answer."""
        if not is_known:
            return 401, b'{"error": "invalid_client", "error_description": "who is that?"}'
        token = {"access_token": f"token-{len(self.asked)}", "token_type": "Bearer", "expires_in": self.expires_in}
        return 200, json.dumps({name: value for name, value in token.items() if value is not None}).encode()
