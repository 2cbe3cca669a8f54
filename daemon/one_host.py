"""``on_checkpoint`` on SQLite is for one host: a member elsewhere would have a database of its own, with offsets of the
same group and half of its effects."""

import socket
from collections.abc import Iterable
from ipaddress import ip_address

import psutil

from kafkasrcd.daemon.group_members import describe_group
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import CommitStrategy, Settings


def check_one_host(settings: Settings, store_url: str) -> None:
    """Ask the group for its members; blocks as ``describe_group`` does.

    Raises ConfigurationError where one is on another host, with ``on_checkpoint`` on SQLite. Does nothing otherwise,
    nor where the broker does not say.
    """
    if settings.commit_strategy is not CommitStrategy.ON_CHECKPOINT or not store_url.startswith("sqlite"):
        return
    group = describe_group(settings)
    elsewhere = other_hosts([] if group is None else [member.host for member in group.members], local_addresses())
    if elsewhere:
        raise ConfigurationError(
            f"store.url: group {settings.group_id!r} has members on other hosts ({', '.join(elsewhere)}), and with "
            "commit_strategy on_checkpoint each would have a SQLite database of its own: name one PostgreSQL database "
            "on all hosts, or stop the others"
        )


def other_hosts(members: Iterable[str], local: set[str]) -> list[str]:
    """Those of ``members``, addresses as a broker has them, that are not on this host. Loopback always is."""
    found: set[str] = set()
    for member in members:
        address = member.lstrip("/")
        try:
            if ip_address(address).is_loopback or address in local:
                continue
        except ValueError:
            if address in local:
                continue
        found.add(address)
    return sorted(found)


def local_addresses() -> set[str]:
    """Of every interface, and the host's own names."""
    addresses = {each.address.partition("%")[0] for some in psutil.net_if_addrs().values() for each in some}
    return addresses | {socket.gethostname(), socket.getfqdn()}
