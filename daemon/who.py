"""Who gives a command."""

import os
import pwd
import socket

from kafkasrcd.storage.dead_letters import as_text


def who() -> str:
    """For what is kept of a command: the user, whoever became root, and the host."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid {os.getuid()}"
    became = os.environ.get("SUDO_USER", "")
    return as_text(f"{became} as {user}" if became else user) + f"@{socket.gethostname()}"
