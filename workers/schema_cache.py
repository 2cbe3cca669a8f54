"""The registry's schemas, kept on this host for all of its workers and for the next start.

A schema of an id never changes, so what is here is right for ever, also while the registry is away. One file an id,
written whole or not at all; what is damaged, or could have been written by someone else, is asked for anew. One worker
asks at a time: of 64 that start at once, one asks, and the others find what it was told.
"""

import fcntl
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.workers.schema_document import NoSuchSchema, RegistryAway, SchemaDocument, SchemaName
from kafkasrcd.workers.schema_registry import SchemaRegistry

_LOOK_AGAIN_SECONDS: Final = 0.02
_MISSING_SECONDS: Final = 30.0
"""How long "there is no such schema" is believed: many records may name it, and one day it may exist."""


Complete = Callable[[SchemaDocument], SchemaDocument]


class _File(msgspec.Struct, frozen=True):
    number: int | str
    document: bytes
    checksum: str


class SchemaCache:
    """``directory``: None keeps everything in this process only, as does a folder that cannot be used."""

    def __init__(self, registry: SchemaRegistry, directory: Path | None) -> None:
        self._registry = registry
        self._missing: dict[SchemaName, tuple[float, NoSuchSchema]] = {}
        self._folder: Path | None = None
        if directory is not None:
            # Ids are a registry's own: another one's number 7 is another schema.
            folder = directory / sha256(registry.name.encode()).hexdigest()[:16]
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if _is_ours(folder):
                    self._folder = folder
            except OSError:
                pass

    @property
    def registry(self) -> SchemaRegistry:
        return self._registry

    def get(self, number: SchemaName, complete: Complete | None = None) -> SchemaDocument:
        """The schema of an id or a GUID; blocks while the registry is asked. Raises NoSuchSchema, RegistryAway.

        ``complete`` adds what costs too much to be made by each worker; it raises nothing.
        """
        asked, missing = self._missing.get(number, (0.0, None))
        if missing is not None and time.monotonic() - asked < _MISSING_SECONDS:
            raise missing
        if (document := self._read(number)) is not None:
            return document
        lock = self._lock()
        try:
            if (document := self._read(number)) is None:  # another worker has asked meanwhile
                document = self._registry.schema(number)
                if complete is not None:
                    document = complete(document)
                self.put(number, document)
        except NoSuchSchema as error:
            now = time.monotonic()
            self._missing = {other: it for other, it in self._missing.items() if now - it[0] < _MISSING_SECONDS}
            self._missing[number] = (now, error)
            raise
        finally:
            if lock is not None:
                os.close(lock)
        return document

    def put(self, number: SchemaName, document: SchemaDocument) -> None:
        """Keep ``document``; where that fails, the next one asks again."""
        if self._folder is None:
            return
        content = msgspec.json.encode(document)
        kept = msgspec.json.encode(_File(_written(number), content, sha256(content).hexdigest()))
        partial = self._folder / f".{number}-{os.getpid()}"
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:
                file.write(kept)
            os.rename(partial, self._folder / f"{number}.json")
        except OSError:
            partial.unlink(missing_ok=True)

    def _read(self, number: SchemaName) -> SchemaDocument | None:
        if self._folder is None:
            return None
        try:
            descriptor = os.open(self._folder / f"{number}.json", os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                if os.fstat(descriptor).st_uid != os.geteuid():
                    return None
                kept = msgspec.json.decode(file.read(), type=_File)
            if kept.number != _written(number) or sha256(kept.document).hexdigest() != kept.checksum:
                return None
            return msgspec.json.decode(kept.document, type=SchemaDocument)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _lock(self) -> int | None:
        """The right to ask; None where there is nothing to lock. Released by closing it, or by this process's end.

        Raises RegistryAway where another worker asks for longer than one request takes.
        """
        if self._folder is None:
            return None
        try:
            descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        deadline = time.monotonic() + self._registry.timeout_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                pass
            except OSError:
                os.close(descriptor)
                return None
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RegistryAway(f"{self._registry.name} is being asked by another worker, and does not answer")
            time.sleep(_LOOK_AGAIN_SECONDS)


def _written(number: SchemaName) -> int | str:
    return number if isinstance(number, int) else str(number)


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put anything into it."""
    found = folder.stat(follow_symlinks=False)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
