"""The user's handler: found by name, and understood by its annotation.

What fits: a function (or any callable) of one positional argument, annotated ``Message[T]``, ``Message``,
``list[Message[T]]``, ``list[Message]``, or not at all; plain or ``async def``. With ``on_checkpoint`` a second one, the
transaction: SQLAlchemy's Connection or Session, or their async counterparts. Further parameters need defaults.
"""

import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from kafkasrcd.errors import ConfigurationError, HandlerMisuse
from kafkasrcd.message import Message
from kafkasrcd.settings import HandlerSettings
from kafkasrcd.workers.formats import JSON, Format, Formats, Kind, Shape
from kafkasrcd.workers.payload import Decode, decoder_of, key_decoder_of, refusing, shape_of
from kafkasrcd.workers.topic_matcher import topic_matcher
from kafkasrcd.workers.user_code import add_to_path

_CURE = "a handler takes one argument: Message[T], list[Message[T]], or an argument without annotation"
_CURE_IN_TRANSACTIONS = (
    "with commit_strategy on_checkpoint a handler takes a message (or a list of them) and the transaction: "
    "(message: Message[T], tx: sqlalchemy.Connection), or a Session; async def: AsyncConnection or AsyncSession"
)
_TRANSACTIONS: dict[tuple[str, bool], Literal["connection", "session"]] = {
    ("Connection", False): "connection",
    ("Session", False): "session",
    ("AsyncConnection", True): "connection",
    ("AsyncSession", True): "session",
}
"""SQLAlchemy's class, and whether the handler is ``async def``, to what a handler is given."""


class HandlerTarget(msgspec.Struct, frozen=True):
    """A handler, ready to be called.

    ``decode`` turns a record's value into the payload that its annotation names.
    """

    name: str
    function: Callable[..., Any]
    is_async: bool
    is_batch: bool
    payload_type: Any
    decode: Decode
    """Of the format ``json``; ``reading`` is for others."""
    transaction: Literal["connection", "session"] | None = None
    """What its second argument is, with ``on_checkpoint``."""

    @property
    def shape(self) -> Shape:
        """What a worker prepares its records as."""
        return shape_of(self.payload_type)

    def reading_or_refusing(self, form: Format) -> "HandlerTarget":
        """As ``reading``; where its annotation does not fit, each record is refused, with the reason."""
        try:
            return self.reading(form)
        except ConfigurationError as error:
            return msgspec.structs.replace(self, decode=refusing(error))

    def reading(self, form: Format) -> "HandlerTarget":
        """The same handler for values of ``form``. Raises ConfigurationError where its annotation does not fit."""
        if form.kind is Kind.JSON:
            return self
        try:
            return msgspec.structs.replace(self, decode=decoder_of(form, self.payload_type))
        except TypeError as error:
            raise _no_such_payload(self.name, form, self.payload_type, error) from None


class HandlerTargets:
    """The handlers of one configuration: one for each topic pattern, and one for all other topics."""

    def __init__(self, by_pattern: Mapping[str, HandlerTarget], default: HandlerTarget | None) -> None:
        self._by_pattern = by_pattern
        self._patterns = [(_matcher(pattern), target) for pattern, target in by_pattern.items()]
        self._default = default

    def for_topic(self, topic: str) -> HandlerTarget:
        """The first that matches; raises ConfigurationError where none does."""
        for matches, target in self._patterns:
            if matches(topic):
                return target
        if self._default is None:
            raise ConfigurationError(f"no handler for topic {topic!r}: set handler.target, or add it to handler.topics")
        return self._default

    def shapes(self) -> list[tuple[str, Shape]]:
        """For each pattern, in order, what workers prepare records as; the pattern of all others is empty."""
        shapes = [(pattern, target.shape) for pattern, target in self._by_pattern.items()]
        return shapes if self._default is None else [*shapes, ("", self._default.shape)]

    def all(self) -> list[HandlerTarget]:
        """Each of them."""
        targets = [target for _, target in self._patterns]
        return targets if self._default is None else [*targets, self._default]


def load_targets(
    settings: HandlerSettings, base_directory: Path, *, in_transactions: bool = False, formats: Formats | None = None
) -> HandlerTargets:
    """Import the handlers; runs the user's modules. Raises ConfigurationError where one cannot be used.

    ``handler.path`` entries, relative to ``base_directory``, are put in front of ``sys.path``. ``formats``: whether
    their annotations fit what their topics have is checked as far as the topics are known.
    """
    add_to_path(settings.path, base_directory)
    is_json = formats is None or not (formats.has_rows or formats.value("").kind is not Kind.JSON)
    by_pattern = {
        pattern: load_target(name, in_transactions, is_json=is_json) for pattern, name in settings.topics.items()
    }
    default = load_target(settings.target, in_transactions, is_json=is_json) if settings.target else None
    targets = HandlerTargets(by_pattern, default)
    if formats is not None:
        for topic, value, key in formats.certain():
            targets.for_topic(topic).reading(value)
            key_decoder_of(key)
    if in_transactions and len({target.is_async for target in targets.all()}) > 1:
        raise ConfigurationError(
            "handler: with commit_strategy on_checkpoint, handlers are either all async def or all plain: they share "
            "a transaction"
        )
    return targets


def load_target(name: str, in_transactions: bool = False, *, is_json: bool = True) -> HandlerTarget:
    """The handler called ``package.module:function``; raises ConfigurationError where it cannot be used.

    ``in_transactions``: it takes the transaction beside the message. ``is_json``: all it is given is JSON.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"handler target {name!r} is not of the form package.module:function")
    function = _import(name, module_name, attribute)
    if not callable(function):
        raise ConfigurationError(f"handler target {name!r} is a {type(function).__name__}, not a function")
    if inspect.isclass(function):
        raise ConfigurationError(f"handler target {name!r} is a class; name a function, or a method of an object")
    body = _body(function)
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise ConfigurationError(f"handler target {name!r} is a generator (it has a yield): its code would never run")
    is_async = inspect.iscoroutinefunction(body)
    annotation, *others = _annotations(name, function, 2 if in_transactions else 1)
    transaction = _transaction(name, others[0], is_async) if others else None
    is_batch = typing.get_origin(annotation) is list or annotation is list
    if is_batch:
        arguments = typing.get_args(annotation)
        annotation = arguments[0] if arguments else Message
    if annotation is inspect.Parameter.empty or annotation is Any or annotation is Message:
        payload_type: Any = Any
    elif typing.get_origin(annotation) is Message:
        payload_type = typing.get_args(annotation)[0]
    else:
        raise ConfigurationError(f"handler target {name!r} takes {_shown(annotation)}; {_CURE}")
    if isinstance(payload_type, typing.TypeVar):
        payload_type = Any
    try:
        decode = decoder_of(JSON, payload_type)
    except TypeError as error:
        refusal = _no_such_payload(name, JSON, payload_type, error)
        if is_json:
            raise refusal from None
        decode = refusing(refusal)
    return HandlerTarget(name, function, is_async, is_batch, payload_type, decode, transaction)


def _no_such_payload(name: str, form: Format, payload_type: Any, error: TypeError) -> ConfigurationError:
    what = "JSON" if form.kind in (Kind.JSON, Kind.JSON_SCHEMA) else f"value of format {form.kind.value}"
    cure = "use a dataclass, TypedDict, msgspec.Struct, a pydantic model, or Message without a type"
    if form.kind in (Kind.STRING, Kind.BYTES):
        cure = f"use Message[{'str' if form.kind is Kind.STRING else 'bytes'}], or another {form.setting}"
    return ConfigurationError(
        f"handler target {name!r}: no {what} can be read as {_shown(payload_type)} ({error}); {cure}"
    )


def refuse_awaitable(returned: object) -> None:
    """Raise HandlerMisuse where a plain handler returned a coroutine: nobody awaits it, and nothing would be done.

    What else it returns is its own business. A wrapper around an async function can be told only when it is called.
    """
    if hasattr(type(returned), "__await__"):
        if inspect.iscoroutine(returned):
            returned.close()
        raise HandlerMisuse(
            "it returned a coroutine, which nobody awaits; declare the function that is named async def"
        )


def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs when ``function`` is called: of a partial its function, of a callable object its ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _import(name: str, module_name: str, attribute: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise ConfigurationError(
                f"handler target {name!r}: there is no module {missing!r} in handler.path or installed"
            ) from None
        raise ConfigurationError(f"handler target {name!r}: its module imports {missing!r}, not installed") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(
            f"handler target {name!r} cannot be imported: {type(error).__name__}: {error}{_place(error)}"
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [each for each in dir(found) if not each.startswith("_") and callable(getattr(found, each, None))]
            raise ConfigurationError(
                f"handler target {name!r}: module {module_name!r} has no {attribute!r}; "
                f"it has {', '.join(public) or 'nothing to call'}"
            ) from None
    return found


def _place(error: BaseException) -> str:
    """Where in the user's module it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""


def _annotations(name: str, function: Callable[..., Any], count: int) -> list[Any]:
    """The annotations of its ``count`` arguments; Parameter.empty where one has none."""
    cure = _CURE if count == 1 else _CURE_IN_TRANSACTIONS
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigurationError(f"handler target {name!r} has no signature that can be read; {cure}") from None
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    positional = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) < count or any(parameter not in positional[:count] for parameter in required):
        if count == 1 and len(required) == 2:
            cure += "; one that takes a transaction too needs commit_strategy on_checkpoint"
        raise ConfigurationError(f"handler target {name!r} is {_shown(inspect.signature(function))}; {cure}")
    names = [parameter.name for parameter in positional[:count]]
    if all(parameter.annotation is inspect.Parameter.empty for parameter in positional[:count]):
        return [inspect.Parameter.empty] * count
    try:
        hints = typing.get_type_hints(_body(function), include_extras=True)
    except Exception as error:  # noqa: BLE001 - it evaluates the user's expressions
        raise ConfigurationError(f"handler target {name!r}: its annotation cannot be resolved: {error}") from None
    return [hints.get(each, inspect.Parameter.empty) for each in names]


def _transaction(name: str, annotation: Any, is_async: bool) -> Literal["connection", "session"]:
    """What an argument annotated so is given. By the class's name: SQLAlchemy is loaded where it is used."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return "connection"
    for base in getattr(annotation, "__mro__", ()):
        kind = _TRANSACTIONS.get((base.__name__, is_async))
        if kind is not None and base.__module__.startswith("sqlalchemy."):
            return kind
    raise ConfigurationError(f"handler target {name!r} takes {_shown(annotation)}; {_CURE_IN_TRANSACTIONS}")


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _matcher(pattern: str) -> Callable[[str], object]:
    """As librdkafka takes topics: a name, or a regular expression where it starts with ``^``."""
    try:
        return topic_matcher(pattern)
    except re.error as error:
        raise ConfigurationError(f"handler.topics has {pattern!r}, no regular expression: {error}") from None
