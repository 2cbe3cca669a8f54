"""``${env:NAME}``, ``${file:/path}`` and ``${credential:NAME}`` in a value, so that no secret need be in a file.

The idea, and the form, are those of Kafka's ConfigProvider (KIP-297). ``credential`` is systemd's: the unit says
``LoadCredential=NAME:/path`` and the service finds the file in ``$CREDENTIALS_DIRECTORY``. ``$${`` stands for ``${``.
What a reference gives is taken as it is and not searched for further references.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from kafkasrcd.workers.redaction import is_secret

PROVIDERS = ("env", "file", "credential")

# An escape, or a reference up to its brace; the last group is set where the brace is missing.
_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<inside>[^}]*)(?P<close>\})?")

# A secret is a line, a key or a certificate chain. More than this is the wrong file, such as /dev/zero.
_LARGEST_BYTES = 1_048_576


class UnresolvedReference(Exception):
    """A reference leads nowhere; the message says which, and what to do."""


class Expanded(msgspec.Struct, frozen=True):
    """``text`` with its references replaced. ``references`` as they were written. ``secret``: do not show it."""

    text: str
    references: tuple[str, ...]
    secret: bool


def expand(text: str, environ: Mapping[str, str], base_directory: Path) -> Expanded:
    """Replace each reference in ``text``; a relative ``file:`` path is relative to ``base_directory``.

    Reads files, so it may block as long as they do. Raises UnresolvedReference.
    """
    references: list[str] = []
    secret = False

    def replace(match: re.Match[str]) -> str:
        nonlocal secret
        if match["inside"] is None:
            return "${"
        if match["close"] is None:
            raise UnresolvedReference("'${' without its '}'; write '$${' for the two characters themselves")
        provider, colon, name = match["inside"].partition(":")
        if not colon or provider not in PROVIDERS or not name:
            hint = f"; for the variable write '${{env:{match['inside']}}}'" if match["inside"].isidentifier() else ""
            raise UnresolvedReference(
                f"'{match[0]}' is no reference: the forms are ${{env:NAME}}, ${{file:/path}} and ${{credential:NAME}}"
                f"{hint}"
            )
        references.append(match[0])
        # A file or a credential is used for what must not be seen; a variable may hold anything.
        secret = secret or provider != "env" or is_secret(name)
        return _value(match[0], provider, name, environ, base_directory)

    expanded = _REFERENCE.sub(replace, text)
    return Expanded(expanded, tuple(references), secret)


def _value(reference: str, provider: str, name: str, environ: Mapping[str, str], base_directory: Path) -> str:
    if provider == "env":
        if name not in environ:
            raise UnresolvedReference(f"'{reference}': the environment has no variable {name}")
        return environ[name]
    if provider == "file":
        return _read(reference, base_directory / name)
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise UnresolvedReference(
            f"'{reference}': $CREDENTIALS_DIRECTORY is not set; systemd sets it for a service with "
            f"LoadCredential={name}:/path"
        )
    if "/" in name or name in {".", ".."}:
        raise UnresolvedReference(f"'{reference}': a credential's name has no '/'; for a path use ${{file:/path}}")
    return _read(reference, Path(directory) / name)


def _read(reference: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnresolvedReference(f"'{reference}' cannot be read: {reason or error}") from None
    if len(content) > _LARGEST_BYTES:
        raise UnresolvedReference(f"'{reference}' is larger than {_LARGEST_BYTES} bytes")
    try:
        # Editors and `echo` end a file with a newline that is no part of the secret.
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UnresolvedReference(f"'{reference}' is not UTF-8 text") from None
