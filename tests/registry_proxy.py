"""What stands before a registry elsewhere: a proxy that counts, wants a password or a certificate, or is ill."""

import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RegistryProxy:
    """Forwards to the registry at `target`.

    `authorization`: what the header must be, else it answers 401. `answer`: a status, a body and headers to answer with
    instead. `certificate`: a PEM file with certificate and key, to speak TLS; `client_ca`: whose certificates a client
    must have.
    """

    def __init__(
        self,
        target: str,
        *,
        authorization: str | None = None,
        certificate: Path | None = None,
        client_ca: Path | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.authorization = authorization
        self.answer: tuple[int, bytes, dict[str, str]] | None = None
        self.hold = threading.Event()
        """Answers wait for it."""
        self.hold.set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.asked.append(self.path)
                proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
                proxy.hold.wait(20)
                status, body, headers = self.forwarded()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client waits no longer

            def forwarded(self) -> tuple[int, bytes, dict[str, str]]:
                if proxy.authorization is not None and self.headers.get("Authorization") != proxy.authorization:
                    return 401, b'{"error_code": 401, "message": "no"}', {}
                if proxy.answer is not None:
                    return proxy.answer
                try:
                    with urllib.request.urlopen(target + self.path, timeout=10) as response:
                        return response.status, response.read(), {}
                except urllib.error.HTTPError as error:
                    with error:
                        return error.code, error.read(), {}

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called above
                """Nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            if client_ca is not None:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "RegistryProxy":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client without a certificate is what a test wants."""


def make_certificate(folder: Path, name: str) -> Path:
    """A certificate of 127.0.0.1 that is its own authority, with its key, in one file."""
    path, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    addition = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(path)]
    subprocess.run([*command, *addition], check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + key.read_text())
    return path
