"""Where the daemon keeps its files: the offset store, the control socket, a registry's schemas."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from kafkasrcd.settings import Settings

_SERVICE_DIRECTORY = Path("/run/kafkasrcd")
"""What RuntimeDirectory= in the systemd unit makes."""

_SERVICE_STORE = Path("/var/lib/kafkasrcd/offsets.db")
"""In what StateDirectory= makes."""


def store_url(settings: Settings, base_directory: Path, environ: Mapping[str, str] = os.environ) -> str:
    """``store.url``; its relative path made relative to the configuration file, and the default where it is empty.

    The default is ``offsets.db`` in systemd's $STATE_DIRECTORY, else in $XDG_STATE_HOME/kafkasrcd.
    """
    url = settings.store.url
    if not url:
        return f"sqlite:///{_state_directory(environ) / 'offsets.db'}"
    prefix = "sqlite:///"
    if url.startswith(prefix):
        return prefix + str(base_directory / url.removeprefix(prefix))
    return url


def existing_store_url(settings: Settings, base_directory: Path, environ: Mapping[str, str] = os.environ) -> str:
    """As ``store_url``, for a command run by hand: where there is no store in the default place of this user, it is the
    service's that is meant."""
    url = store_url(settings, base_directory, environ)
    if settings.store.url or Path(url.removeprefix("sqlite:///")).exists():
        return url
    try:
        there = _SERVICE_STORE.exists()
    except PermissionError:
        there = True  # the database says who may
    return f"sqlite:///{_SERVICE_STORE}" if there else url


def schema_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Beside the default store, since it is to outlive the daemon: a registry may be away when it starts again."""
    return _state_directory(environ) / "schemas"


def _state_directory(environ: Mapping[str, str]) -> Path:
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if state:
        return Path(state)
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kafkasrcd"


def control_path(settings: Settings, base_directory: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The control socket: ``supervisor.control_socket``, else ``<group_id>.sock`` in the runtime directory.

    The runtime directory is ``supervisor.runtime_directory``, else systemd's $RUNTIME_DIRECTORY, else /run/kafkasrcd
    where the service's socket is in there, else $XDG_RUNTIME_DIR/kafkasrcd, else a folder of this user's in /tmp.
    """
    supervisor = settings.supervisor
    if supervisor.control_socket:
        return base_directory / supervisor.control_socket
    name = re.sub(r"[^A-Za-z0-9._-]", "_", settings.group_id) + ".sock"
    if supervisor.runtime_directory:
        return base_directory / supervisor.runtime_directory / name
    systemd = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if systemd:
        return Path(systemd) / name
    # A command run by hand beside the service finds the service's folder.
    service = _SERVICE_DIRECTORY / name
    try:
        if service.exists():
            return service
    except PermissionError:
        return service  # to say "not running" would be a guess; who opens it hears who may
    user = environ.get("XDG_RUNTIME_DIR")
    return (Path(user) / "kafkasrcd" if user else Path(f"/tmp/kafkasrcd-{os.getuid()}")) / name  # noqa: S108
