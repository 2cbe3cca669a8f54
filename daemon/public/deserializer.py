"""A format of the user's own."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Deserializer(Generic[T]):
    """Reads values (or keys) of a format of your own: ``value_format = "custom:package.module:Class"``.

    One object of the class is made in each process that needs it, without arguments. Inheriting from this is optional:
    the two methods are what counts. Whatever they raise is the reason why that one record cannot be read. A null value
    is given to neither.

        class Lines(Deserializer[list[str]]):
            def prepare(self, raw: bytes) -> bytes:
                return zlib.decompress(raw)

            def build(self, prepared: bytes) -> list[str]:
                return prepared.decode().splitlines()
    """

    def prepare(self, raw: bytes) -> bytes:
        """In the partition's worker: the costly half, which runs for all partitions at once. As it is, without this."""
        return raw

    def build(self, prepared: bytes) -> T:
        """In the handler process: the payload, of what ``prepare`` returned."""
        raise NotImplementedError
