"""The handlers of the rows with formats: nothing is done, with the payload as its annotation says."""

from typing import TYPE_CHECKING, Any

from kafkasrcd import Message
from tests.bench.order_formats import Order, protobuf_class

if TYPE_CHECKING:
    from google.protobuf.message import Message as ProtobufOrder
else:
    ProtobufOrder = protobuf_class()


def take_any(message: Message[Any]) -> None:
    """Dicts and lists."""


def take_order(message: Message[Order]) -> None:
    """A dataclass."""


def take_protobuf(message: Message[ProtobufOrder]) -> None:
    """A generated class."""
