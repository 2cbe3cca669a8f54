"""One thing that is wrong with a configuration."""

from collections.abc import Iterable

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """``setting`` is the dotted name it is reported under, ``text`` what is wrong and what is allowed.

    ``involves`` names the other settings it depends on: where one of those is itself unusable, this is not reported,
    since it may only follow from that. ``origin`` is where the value came from, where that is known already.
    """

    setting: str
    text: str
    involves: tuple[str, ...] = ()
    origin: str = ""

    def line(self) -> str:
        """The problem on one line, whatever characters a name has in it."""
        parts = [part for part in (self.origin, self.setting, self.text) if part]
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
            for char in ": ".join(parts)
        )

    def depends_on(self, settings: Iterable[str]) -> bool:
        """Whether any of ``settings``, or a key of such a table, takes part in this problem."""
        own = (self.setting, *self.involves)
        return any(name == other or name.startswith(f"{other}.") for name in settings for other in own)
