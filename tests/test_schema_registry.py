"""The registry's client and the schemas kept on the host: who is asked, how often, and what is believed."""

import base64
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers.schema_cache import SchemaCache
from kafkasrcd.workers.schema_document import NoSuchSchema, RegistryAway, SchemaDocument
from kafkasrcd.workers.schema_registry import SchemaRegistry
from tests.registry_proxy import RegistryProxy, make_certificate
from tests.registry_server import RegistryServer
from tests.token_server import TokenServer

SCHEMA = json.dumps({"type": "record", "name": "User", "fields": [{"name": "name", "type": "string"}]})


@pytest.fixture
def number(schema_registry: RegistryServer) -> int:
    """A schema that it has."""
    return schema_registry.register("a-subject", SCHEMA)


def asking(url: str, folder: Path = Path(), *, timeout_ms: int = 5_000, **settings: str) -> SchemaRegistry:
    given = msgspec.convert({"url": url, "timeout_ms": timeout_ms, **settings}, SchemaRegistrySettings)
    return SchemaRegistry(given, folder)


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_user_and_password(schema_registry: RegistryServer, number: int) -> None:
    expected = "Basic " + base64.b64encode("ann:hunter2:ü".encode()).decode()
    with RegistryProxy(schema_registry.url, authorization=expected) as proxy:
        assert asking(proxy.url, username="ann", password="hunter2:ü").schema(number).text == SCHEMA
        with pytest.raises(RegistryAway) as refused:
            asking(proxy.url, username="ann", password="hunter3").schema(number)
    assert "answers 401" in str(refused.value)
    assert "check schema_registry.username and password" in str(refused.value)
    assert "hunter3" not in str(refused.value)


def test_a_bearer_token(schema_registry: RegistryServer, number: int) -> None:
    with RegistryProxy(schema_registry.url, authorization="Bearer s3cret") as proxy:
        assert asking(proxy.url, bearer_token="s3cret").schema(number).text == SCHEMA


CLIENT = "Basic " + base64.b64encode(b"orders:hunter2").decode()


def as_client(proxy: RegistryProxy, tokens: TokenServer, **more: str) -> SchemaRegistry:
    settings = {
        "bearer_issuer_endpoint_url": tokens.url,
        "bearer_client_id": "orders",
        "bearer_client_secret": "hunter2",
        **more,
    }
    return asking(proxy.url, Path(), **settings, timeout_ms=5_000)


def test_a_token_of_an_oauth_client_is_kept(schema_registry: RegistryServer, number: int) -> None:
    with (
        TokenServer(CLIENT) as tokens,
        RegistryProxy(schema_registry.url, authorization="Bearer token-1") as proxy,
    ):
        more = {"bearer_scope": "a b", "bearer_logical_cluster": "lsrc-1", "bearer_identity_pool_id": "pool-2"}
        registry = as_client(proxy, tokens, **more)
        assert tokens.asked == [], "nothing is asked before it is needed"
        for _ in range(3):
            assert registry.schema(number).text == SCHEMA
        assert tokens.asked == [{"grant_type": ["client_credentials"], "scope": ["a b"]}]
        assert {(each["target-sr-cluster"], each["confluent-identity-pool-id"]) for each in proxy.headers} == {
            ("lsrc-1", "pool-2")
        }


@pytest.mark.parametrize(("expires_in", "fetched"), [(0, 3), ("0", 3), (None, 1), (3_600, 1)])
def test_a_token_is_fetched_anew_before_it_expires(
    schema_registry: RegistryServer, number: int, expires_in: object, fetched: int
) -> None:
    with TokenServer(CLIENT, expires_in) as tokens, RegistryProxy(schema_registry.url) as proxy:
        registry = as_client(proxy, tokens)
        for _ in range(3):
            registry.schema(number)
        assert [each["authorization"] for each in proxy.headers][-1] == f"Bearer token-{fetched}"
        assert len(tokens.asked) == fetched


def test_a_token_that_is_refused_is_fetched_anew_once(schema_registry: RegistryServer, number: int) -> None:
    with TokenServer(CLIENT) as tokens, RegistryProxy(schema_registry.url) as proxy:
        registry = as_client(proxy, tokens)
        registry.schema(number)
        proxy.authorization = "Bearer token-2"
        assert registry.schema(number).text == SCHEMA
        assert len(proxy.asked) == 3
        proxy.authorization = "Bearer token-9"
        with pytest.raises(RegistryAway, match=r"answers 401 .* check schema_registry\.bearer_scope, "):
            registry.schema(number)
        assert len(tokens.asked) == 3
        with pytest.raises(RegistryAway):
            registry.schema(number)
        assert (len(tokens.asked), len(proxy.asked)) == (4, 7), "one more token for a question"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b""), "answers 500"),
        ((200, b"<html>"), "answers with something that is no token"),
        ((200, b"{}"), "answers with something that is no token"),
        ((200, b'{"access_token": "a\\nb"}'), "answers with a token that fits no header"),
        ((302, b""), "answers 302"),
        (None, r"answers 401 Unauthorized \(invalid_client: who is that\?\); check schema_registry\.bearer_client_id"),
    ],
)
def test_without_a_token_nothing_is_asked_and_what_is_in_the_way_is_said(
    answer: tuple[int, bytes] | None, said: str
) -> None:
    with TokenServer(CLIENT) as tokens, RegistryProxy("http://127.0.0.1:9") as proxy:
        tokens.answer = answer
        with pytest.raises(RegistryAway, match=rf"^the token endpoint {tokens.url} {said}") as away:
            as_client(proxy, tokens, bearer_client_secret="hunter3").schema(1)
        assert proxy.asked == []
        assert "hunter" not in str(away.value)
    with pytest.raises(RegistryAway, match=r"^the token endpoint http://127\.0\.0\.1:\d+/token: "):
        as_client(proxy, tokens).schema(1)


def test_credentials_in_the_address_are_sent_and_not_shown(schema_registry: RegistryServer, number: int) -> None:
    expected = "Basic " + base64.b64encode(b"ann:hunter2").decode()
    with RegistryProxy(schema_registry.url, authorization=expected) as proxy:
        registry = asking(proxy.url.replace("://", "://ann:hunter2@"))
        assert registry.schema(number).text == SCHEMA
    with pytest.raises(RegistryAway) as away:
        registry.schema(number)
    assert "hunter2" not in registry.name + str(away.value)


def test_tls_with_a_certificate_of_the_client_s(schema_registry: RegistryServer, number: int, tmp_path: Path) -> None:
    server, client = make_certificate(tmp_path, "server"), make_certificate(tmp_path, "client")
    with RegistryProxy(schema_registry.url, certificate=server, client_ca=client) as proxy:
        trusting = partial(asking, proxy.url, tmp_path, ca_location="server.pem", certificate_location="client.pem")
        assert trusting().schema(number).text == SCHEMA
        assert trusting(key_location="client.key").schema(number).text == SCHEMA
        with pytest.raises(RegistryAway, match="CERTIFICATE_VERIFY_FAILED"):
            asking(proxy.url, tmp_path).schema(number)
        with pytest.raises(RegistryAway):
            asking(proxy.url, tmp_path, ca_location="server.pem").schema(number)
        with pytest.raises(RegistryAway):
            asking(proxy.url, tmp_path, ca_location="nowhere.pem").schema(number)


# ---- what is an answer -----------------------------------------------------------------------------------------------


def test_only_a_registry_says_that_there_is_no_such_schema(schema_registry: RegistryServer, number: int) -> None:
    with pytest.raises(NoSuchSchema):
        asking(schema_registry.url).schema(2_000_000_000)
    with pytest.raises(RegistryAway, match=r"answers 404.*check schema_registry\.url"):
        asking(schema_registry.url + "/nowhere").schema(number)


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>", {}),
        (200, b"{}", {}),
        (200, b"", {}),
        (404, b"<html>Not Found</html>", {}),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}', {}),
        (403, b"", {}),
        (429, b"", {}),
        (500, b'{"error_code": 50001}', {}),
        (503, b"", {}),
        (302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}),
        (200, b" " * (16 * 1024 * 1024 + 1), {}),
    ],
)
def test_whatever_else_it_answers_is_waited_for(answer: tuple[int, bytes, dict[str, str]]) -> None:
    with RegistryProxy("http://127.0.0.1:9") as proxy:
        proxy.answer = answer
        with pytest.raises(RegistryAway):
            asking(proxy.url).schema(1)
        assert len(proxy.asked) == 1, "no redirect is followed, nothing is tried again here"


def test_one_that_hangs_is_given_up_at_the_timeout() -> None:
    with RegistryProxy("http://127.0.0.1:9") as proxy:
        proxy.hold.clear()
        with pytest.raises(RegistryAway, match="timed out"):
            asking(proxy.url, timeout_ms=200).schema(1)


def test_the_next_address_is_asked_where_one_does_not_answer(schema_registry: RegistryServer, number: int) -> None:
    assert asking(f"http://127.0.0.1:9, {schema_registry.url}/").schema(number).text == SCHEMA
    with pytest.raises(RegistryAway, match=r"http://127\.0\.0\.1:9: .*; http://127\.0\.0\.1:7: "):
        asking("http://127.0.0.1:9,http://127.0.0.1:7").schema(number)


def test_whether_one_is_there(schema_registry: RegistryServer) -> None:
    asking(schema_registry.url).check()
    with pytest.raises(RegistryAway):
        asking(schema_registry.url + "/nowhere").check()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_kept_needs_no_registry_any_more(schema_registry: RegistryServer, number: int, tmp_path: Path) -> None:
    with RegistryProxy(schema_registry.url) as proxy:
        first = SchemaCache(asking(proxy.url), tmp_path).get(number)
        url = proxy.url
    assert SchemaCache(asking(url), tmp_path).get(number) == first
    with pytest.raises(RegistryAway):
        SchemaCache(asking(url), tmp_path).get(number + 1)
    with pytest.raises(RegistryAway):
        SchemaCache(asking("http://127.0.0.1:9"), tmp_path).get(number)  # another registry's


def test_many_at_once_ask_once(schema_registry: RegistryServer, number: int, tmp_path: Path) -> None:
    with RegistryProxy(schema_registry.url) as proxy, ThreadPoolExecutor(16) as pool:
        caches = [SchemaCache(asking(proxy.url), tmp_path) for _ in range(64)]

        def get(cache: SchemaCache) -> str:
            return cache.get(number).text

        assert set(pool.map(get, caches)) == {SCHEMA}
        assert len(proxy.asked) == 1


def test_those_who_wait_for_one_that_asks_in_vain_are_told_so(tmp_path: Path) -> None:
    with RegistryProxy("http://127.0.0.1:9") as proxy:
        proxy.hold.clear()
        slow = SchemaCache(asking(proxy.url, timeout_ms=3_000), tmp_path)
        told: list[BaseException] = []

        def ask() -> None:
            with pytest.raises(RegistryAway) as away:
                slow.get(1)
            told.append(away.value)

        asks = threading.Thread(target=ask)
        asks.start()
        while not proxy.asked:
            pass
        with pytest.raises(RegistryAway, match="asked by another worker"):
            SchemaCache(asking(proxy.url, timeout_ms=100), tmp_path).get(1)
        proxy.hold.set()
        asks.join()
        assert told


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "torn":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "changed":
            at = content.index(b'"document":"') + 20
            path.write_bytes(content[:at] + (b"A" if content[at : at + 1] != b"A" else b"B") + content[at + 1 :])
        case "of another id":
            path.write_bytes(content.replace(b'"number":', b'"number":1'))
        case "a link":
            path.rename(path.with_suffix(".elsewhere"))
            path.symlink_to(path.with_suffix(".elsewhere"))
        case "another user's":
            os.chown(path, 12345, 12345)
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize("how", ["torn", "empty", "changed", "of another id", "a link", "another user's"])
def test_what_is_damaged_or_foreign_is_asked_for_anew(
    how: str, schema_registry: RegistryServer, number: int, tmp_path: Path
) -> None:
    if how == "another user's" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    with RegistryProxy(schema_registry.url) as proxy:
        SchemaCache(asking(proxy.url), tmp_path).get(number)
        (path,) = tmp_path.rglob(f"{number}.json")
        damage(path, how)
        assert SchemaCache(asking(proxy.url), tmp_path).get(number).text == SCHEMA
        assert len(proxy.asked) == 2


def test_a_folder_that_cannot_be_used_costs_only_the_memory_of_it(
    schema_registry: RegistryServer, number: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert SchemaCache(asking(schema_registry.url), tmp_path / "file").get(number).text == SCHEMA
    shared = tmp_path / "shared"
    SchemaCache(asking(schema_registry.url), shared).get(number)
    (folder,) = shared.iterdir()
    (folder / f"{number}.json").unlink()
    folder.chmod(0o777)
    SchemaCache(asking(schema_registry.url), shared).get(number)
    assert not (folder / f"{number}.json").exists(), "others could write there"


def test_that_there_is_none_is_believed_for_a_while(schema_registry: RegistryServer, tmp_path: Path) -> None:
    with RegistryProxy(schema_registry.url) as proxy:
        cache = SchemaCache(asking(proxy.url), tmp_path)
        for _ in range(5):
            with pytest.raises(NoSuchSchema):
                cache.get(2_000_000_000)
        assert len(proxy.asked) == 1


def test_no_repr_shows_a_password() -> None:
    secrets = {"password": "hunter2", "bearer_token": "hunter3", "bearer_client_secret": "hunter4"}
    settings = msgspec.convert({"url": "http://u:hunter1@x", **secrets}, SchemaRegistrySettings)
    shown: list[Any] = [settings, SchemaDocument(kind="AVRO", text="{}")]
    assert "hunter" not in repr(shown)
