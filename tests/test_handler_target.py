"""Finding a handler by its name, and understanding its signature: what fits, and what is said about what does not."""

import asyncio
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.message import Message
from kafkasrcd.settings import HandlerSettings
from kafkasrcd.workers.handler_target import HandlerTarget, load_target, load_targets

_numbers = itertools.count()
MakeModule = Callable[[str], str]


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeModule]:
    """Writes a module that handlers can be in, and returns its name."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known = set(sys.modules)

    def make(source: str) -> str:
        name = f"handlers_under_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(dedent(source))
        return name

    yield make
    for name in set(sys.modules) - known:
        if name.startswith("handlers_under_test_"):
            del sys.modules[name]


PRELUDE = """
import dataclasses, functools, typing
import msgspec, pydantic
import pydantic.dataclasses
from kafkasrcd import Message

@dataclasses.dataclass
class Order:
    id: int

class TypedOrder(typing.TypedDict):
    id: int

class StructOrder(msgspec.Struct):
    id: int

class ModelOrder(pydantic.BaseModel):
    id: int

@pydantic.dataclasses.dataclass
class CheckedOrder:
    id: int

    @pydantic.field_validator("id")
    @classmethod
    def positive(cls, value: int) -> int:
        if value < 0:
            raise ValueError("an id is positive")
        return value

class Plain:
    pass

T = typing.TypeVar("T")
seen = []
"""


@pytest.fixture
def load(make_module: MakeModule) -> Callable[..., HandlerTarget]:
    """The target called ``handle`` in a module of this source."""

    def loaded(source: str, attribute: str = "handle") -> HandlerTarget:
        return load_target(f"{make_module(PRELUDE + dedent(source))}:{attribute}")

    return loaded


Load = Callable[..., HandlerTarget]


def called(target: HandlerTarget, value: bytes = b'{"id": 5}') -> list[Any]:
    """Call it as a runner would; returns what the module's ``seen`` has then."""
    message: Message[Any] = Message(target.decode(value), offset=3)
    returned = target.function([message] if target.is_batch else message)
    assert inspect.isawaitable(returned) == target.is_async, "it would never be awaited, or is no coroutine"
    if target.is_async:

        async def wait() -> None:
            await returned

        asyncio.run(wait())
    seen: list[Any] = sys.modules[target.name.partition(":")[0]].__dict__["seen"]
    return seen


def payload_of(seen: list[Any]) -> Any:
    argument: Any
    (argument,) = seen
    return (argument if hasattr(argument, "payload") else argument[0]).payload


# ---- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Order", "StructOrder", "ModelOrder", "CheckedOrder"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("prefix", ["", "async "], ids=["plain", "async"])
def test_classes_of_payloads(load: Load, kind: str, batch: bool, prefix: str) -> None:
    annotation = f"list[Message[{kind}]]" if batch else f"Message[{kind}]"
    target = load(f"{prefix}def handle(message: {annotation}) -> None: seen.append(message)")
    assert (target.is_batch, target.is_async) == (batch, bool(prefix))
    payload = payload_of(called(target))
    assert type(payload).__name__ == kind
    assert payload.id == 5
    for wrong in (b'{"id": "five"}', b"{}", b"not JSON", b""):
        with pytest.raises(Exception, match=r"(?i)id|malformed|invalid|truncated"):
            target.decode(wrong)


def test_a_validator_of_a_pydantic_dataclass_is_asked(load: Load) -> None:
    target = load("def handle(message: Message[CheckedOrder]): seen.append(message)")
    with pytest.raises(ValueError, match="an id is positive"):
        target.decode(b'{"id": -5}')


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("Message[TypedOrder]", b'{"id": 5}', {"id": 5}),
        ("Message[dict[str, int]]", b'{"a": 1}', {"a": 1}),
        ("Message[int | str]", b'"x"', "x"),
        ("Message[typing.Any]", b"[1, null]", [1, None]),
        ("Message", b'{"any": ["thing"]}', {"any": ["thing"]}),
        ("Message[T]", b"1.5", 1.5),
        ("typing.Any", b"[]", []),
        ("list", b"{}", {}),
        ("typing.List", b"{}", {}),
        ("list[Message]", b"{}", {}),
        ("typing.List[Message[TypedOrder]]", b'{"id": 1}', {"id": 1}),
        ("list[typing.Any]", b"2", 2),
        ("'Message[TypedOrder]'", b'{"id": 5}', {"id": 5}),
        ("'list[Message[TypedOrder]]'", b'{"id": 5}', {"id": 5}),
    ],
)
def test_annotations(load: Load, annotation: str, value: bytes, expected: object) -> None:
    target = load(f"def handle(message: {annotation}): seen.append(message)")
    assert target.is_batch == ("list" in annotation.lower().split("[")[0])
    assert payload_of(called(target, value)) == expected


def test_a_constraint_in_the_annotation_is_asked(load: Load) -> None:
    target = load("def handle(message: Message[typing.Annotated[int, msgspec.Meta(gt=0)]]): seen.append(message)")
    assert target.decode(b"1") == 1
    with pytest.raises(ValueError, match="Expected `int` >= 1"):
        target.decode(b"0")


@pytest.mark.parametrize("annotation", ["Message", "Message[T]", "Message[typing.Any]", "list", "list[Message]"])
def test_without_a_type_the_payload_is_anything(load: Load, annotation: str) -> None:
    assert load(f"def handle(message: {annotation}): seen.append(message)").payload_type is Any


def test_no_annotation(load: Load) -> None:
    target = load("def handle(message): seen.append(message)")
    assert not target.is_batch
    assert not target.is_async
    assert payload_of(called(target, b'{"a": [1]}')) == {"a": [1]}


def test_postponed_annotations(make_module: MakeModule) -> None:
    source = "from __future__ import annotations\n" + PRELUDE + "def handle(m: list[Message[Order]]): seen.append(m)\n"
    target = load_target(f"{make_module(source)}:handle")
    assert target.is_batch
    assert payload_of(called(target)).id == 5


SHAPES = {
    "defaults": "def handle(message: Message[Order], option=1, *rest, flag=False, **more): seen.append(message)",
    "positional only": "def handle(message: Message[Order], /): seen.append(message)",
    "lambda": "handle = lambda message: seen.append(message)",
    "callable object": """
        class Handler:
            def __call__(self, message: Message[Order]): seen.append(message)
        handle = Handler()
        """,
    "async callable object": """
        class Handler:
            async def __call__(self, message: Message[Order]): seen.append(message)
        handle = Handler()
        """,
    "method": """
        class Handler:
            def method(self, message: Message[Order]): seen.append(message)
        handle = Handler().method
        """,
    "async method": """
        class Handler:
            async def method(self, message: Message[Order]): seen.append(message)
        handle = Handler().method
        """,
    "class method": """
        class Handler:
            @classmethod
            def method(cls, message: Message[Order]): seen.append(message)
        handle = Handler.method
        """,
    "static method": """
        class Handler:
            @staticmethod
            def method(message: Message[Order]): seen.append(message)
        handle = Handler.method
        """,
    "partial by keyword": """
        def with_option(message: Message[Order], option): seen.append(message)
        handle = functools.partial(with_option, option=1)
        """,
    "partial by position": """
        def with_first(first, message: Message[Order]): seen.append(message)
        handle = functools.partial(with_first, "first")
        """,
    "partial of async": """
        async def with_first(first, message: Message[Order]): seen.append(message)
        handle = functools.partial(with_first, "first")
        """,
    "partial of an async callable object": """
        class Handler:
            async def __call__(self, first, message: Message[Order]): seen.append(message)
        handle = functools.partial(Handler(), "first")
        """,
    "partial of a partial": """
        def with_two(first, second, message: Message[Order]): seen.append(message)
        handle = functools.partial(functools.partial(with_two, 1), 2)
        """,
    "partial of a named partial": """
        def with_two(first, second, message: Message[Order]): seen.append(message)
        inner = functools.partial(with_two, 1)
        inner.name = "one that has attributes stays as it is"
        handle = functools.partial(inner, 2)
        """,
    "partial of a method": """
        class Handler:
            def method(self, first, message: Message[Order]): seen.append(message)
        handle = functools.partial(Handler().method, "first")
        """,
    "decorated": """
        def decorator(function):
            @functools.wraps(function)
            def wrapper(*args, **kwargs): return function(*args, **kwargs)
            return wrapper
        @decorator
        def handle(message: Message[Order]): seen.append(message)
        """,
    "decorated async": """
        def decorator(function):
            @functools.wraps(function)
            async def wrapper(*args, **kwargs): return await function(*args, **kwargs)
            return wrapper
        @decorator
        async def handle(message: Message[Order]): seen.append(message)
        """,
}


@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_of_handlers(load: Load, source: str) -> None:
    target = load(source)
    assert target.is_async == ("async" in source)
    payload = payload_of(called(target))
    assert (payload["id"] if "lambda" in source else payload.id) == 5


def test_dotted_attributes(load: Load) -> None:
    source = """
        class Group:
            class Inner:
                @staticmethod
                def handle(message: Message[Order]): seen.append(message)
        """
    assert payload_of(called(load(source, "Group.Inner.handle"))).id == 5


# ---- what does not fit -----------------------------------------------------------------------------------------------

CURE = r"a handler takes one argument: Message\[T\], list\[Message\[T\]\], or an argument without annotation"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def handle(): pass", rf"is \(\); {CURE}"),
        ("def handle(first, second): pass", rf"is \(first, second\); {CURE}"),
        ("def handle(message, *, needed): pass", rf"is \(message, \*, needed\); {CURE}"),
        ("def handle(*, message): pass", CURE),
        ("def handle(message=None, *, needed): pass", rf"is \(message=None, \*, needed\); {CURE}"),
        ("def handle(*messages): pass", CURE),
        ("def handle(**fields): pass", CURE),
        ("class Handler:\n    def handle(self, message): pass\nhandle = Handler.handle", CURE),
        ("def handle(message: Order): pass", rf"takes Order; {CURE}"),
        ("def handle(message: int): pass", rf"takes int; {CURE}"),
        ("def handle(message: list[Order]): pass", rf"takes Order; {CURE}"),
        ("def handle(message: list[list[Message]]): pass", rf"takes list\[.*Message\]; {CURE}"),
        ("def handle(message: tuple[Message, ...]): pass", rf"takes tuple\[.*\]; {CURE}"),
        ("def handle(message: typing.Sequence[Message[Order]]): pass", rf"takes typing.Sequence\[.*\]; {CURE}"),
        ("def handle(message: Message[Order] | None): pass", rf"takes .*Message\[.*Order\].*; {CURE}"),
        (
            "def handle(message: 'Message[Missing]'): pass",
            "annotation cannot be resolved: name 'Missing' is not defined",
        ),
        ("handle = 5", "is a int, not a function"),
        ("handle = None", "is a NoneType, not a function"),
        ("handle = 'text'", "is a str, not a function"),
        ("class handle:\n    def __init__(self, message): pass", "is a class"),
        ("class handle:\n    def __init__(self, message: Message[Order]): pass", "is a class"),
        ("def handle(message): yield", "generator.*never run"),
        ("async def handle(message): yield", "generator.*never run"),
        ("def handle(message: Message[Plain]): pass", r"no JSON can be read as Plain.*use a dataclass.*pydantic"),
        ("def handle(message: Message[list[Plain]]): pass", r"no JSON can be read as list\[.*Plain"),
        ("def handle(message: list[Message[Plain]]): pass", "no JSON can be read as Plain"),
        ("def handle(message: Message[list[ModelOrder]]): pass", r"no JSON can be read as list\[.*ModelOrder"),
        ("def handle(message: Message[complex]): pass", "no JSON can be read as complex"),
        ("def handle(message: Message[dict[str, typing.Callable]]): pass", r"no JSON can be read as dict\["),
    ],
)
def test_what_does_not_fit_is_said(load: Load, source: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        load(source)
    text = str(caught.value)
    assert re.match(r"handler target 'handlers_under_test_\d+:handle'", text), "it names the target"
    assert "\n" not in text


@pytest.mark.parametrize("name", ["", "module", "module.function", ":function", "module:", ":"])
def test_a_name_is_module_and_function(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name!r} is not of the form package.module:function"):
        load_target(name)


# ---- what cannot be imported -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("nowhere_at_all:handle", "nowhere_at_all"),
        ("nowhere_at_all.inner:handle", "nowhere_at_all"),
        ("json.nowhere:handle", "json.nowhere"),
        ("textwrap.nowhere:handle", "textwrap.nowhere"),
    ],
)
def test_a_missing_module(name: str, missing: str) -> None:
    with pytest.raises(ConfigurationError, match=f"there is no module {missing!r} in handler.path or installed"):
        load_target(name)


def test_a_module_whose_import_is_missing(make_module: MakeModule) -> None:
    name = make_module("import not_installed_here.inner\n")
    with pytest.raises(ConfigurationError, match=f"'{name}:handle': its module imports 'not_installed_here', not inst"):
        load_target(f"{name}:handle")


@pytest.mark.parametrize(
    ("source", "says", "line"),
    [
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero", 2),
        ("\n\nraise RuntimeError('no database')\n", "RuntimeError: no database", 3),
        ("def inner():\n    raise KeyError('K')\ninner()\n", "KeyError: 'K'", 2),
        ("from json import nothing_like_it\n", "ImportError: cannot import name 'nothing_like_it'", 1),
        ("def handle(message):\n    return )\n", "SyntaxError: unmatched", 2),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0", 2),
        ("raise SystemExit('not as a script')\n", "SystemExit: not as a script", 1),
    ],
)
def test_an_error_inside_the_module_is_told_with_its_place(
    make_module: MakeModule, tmp_path: Path, source: str, says: str, line: int
) -> None:
    name = make_module(source)
    with pytest.raises(ConfigurationError) as caught:
        load_target(f"{name}:handle")
    text = str(caught.value)
    assert text.startswith(f"handler target '{name}:handle' cannot be imported: {says}")
    assert text.endswith(f"({tmp_path / name}.py:{line})")
    assert caught.value.__cause__ is not None


def test_a_missing_attribute_names_what_there_is(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r"module '\w+' has no 'handel'; it has .*\bhandle\b") as caught:
        load("def handle(message): pass\n_private = handle\nnumber = 5", "handel")
    assert "_private" not in str(caught.value)
    assert "number" not in str(caught.value)


def test_a_missing_inner_attribute_names_what_its_class_has(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r"has no 'Group.handel'; it has handle$"):
        load("class Group:\n    @staticmethod\n    def handle(message): pass", "Group.handel")


def test_a_module_without_anything(make_module: MakeModule) -> None:
    name = make_module("")
    with pytest.raises(ConfigurationError, match=rf"module '{name}' has no 'handle'; it has nothing to call$"):
        load_target(f"{name}:handle")


def test_a_module_whose_attributes_cannot_all_be_read(make_module: MakeModule) -> None:
    name = make_module(
        "def __dir__(): return ['gone', 'handle']\ndef handle(message): pass\n"
        "def __getattr__(name): raise AttributeError(name)\n"
    )
    with pytest.raises(ConfigurationError, match=r"has no 'handel'; it has handle$"):
        load_target(f"{name}:handel")


# ---- handlers by topic -----------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(make_module: MakeModule) -> str:
    return make_module("\n".join(f"def {name}(message): pass" for name in ("orders", "eu", "other", "default")))


def settings_of(handlers: str, topics: dict[str, str], target: str = "") -> HandlerSettings:
    return HandlerSettings(
        target=f"{handlers}:{target}" if target else "",
        topics={pattern: f"{handlers}:{name}" for pattern, name in topics.items()},
    )


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("orders", "orders"),  # the name, before the pattern
        ("orders-eu", "eu"),  # the first pattern that matches
        ("orders-us", "other"),
        ("my-orders", "default"),  # a pattern is anchored
        ("ordersX", "other"),
        ("a.b", "orders"),
        ("aXb", "default"),  # a name is no pattern
        ("", "default"),
    ],
)
def test_the_first_that_matches_handles_a_topic(handlers: str, tmp_path: Path, topic: str, expected: str) -> None:
    topics = {"orders": "orders", "a.b": "orders", "^orders-eu$": "eu", "^orders": "other"}
    targets = load_targets(settings_of(handlers, topics, "default"), tmp_path)
    assert targets.for_topic(topic).name == f"{handlers}:{expected}"
    assert [target.name.partition(":")[2] for target in targets.all()] == ["orders", "orders", "eu", "other", "default"]


def test_a_topic_without_handler_is_said(handlers: str, tmp_path: Path) -> None:
    targets = load_targets(settings_of(handlers, {"orders": "orders"}), tmp_path)
    assert len(targets.all()) == 1
    with pytest.raises(
        ConfigurationError, match=r"no handler for topic 'audit': set handler.target, or add it to hand"
    ):
        targets.for_topic("audit")


def test_one_handler_that_cannot_be_used_is_enough(handlers: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no 'missing'"):
        load_targets(settings_of(handlers, {"orders": "orders", "audit": "missing"}, "default"), tmp_path)


def test_a_pattern_that_is_none_is_said(handlers: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"handler\.topics.*'\^orders\('"):
        load_targets(settings_of(handlers, {"^orders(": "orders"}), tmp_path)


def test_the_path_is_searched_in_its_order_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = f"handlers_under_test_{next(_numbers)}"
    for folder in ("first", "second", "last"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{module}.py").write_text(f"def {folder}(message): pass\n")
    sys.path.append(str(tmp_path / "second"))  # as from PYTHONPATH: it is moved to where the setting has it
    sys.path.insert(0, str(tmp_path / "last"))
    settings = HandlerSettings(target=f"{module}:second", path=["second", str(tmp_path / "first")])
    assert load_targets(settings, tmp_path).for_topic("any").name == f"{module}:second"
    assert sys.path[:3] == [str(tmp_path / name) for name in ("second", "first", "last")]
    assert sys.path.count(str(tmp_path / "second")) == 1
    del sys.modules[module]
