"""Which proxies of the environment are gone through, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.hits import Hit
from retriever_service.service.client import RetrieverHttpClient
from retriever_service.service.proxies import proxy_before
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.service.test_client import Search, both_ways

PROXY = "http://proxy.example:3128"
LOOPBACK, INSIDE, OUTSIDE = "http://127.0.0.1:8000", "http://10.1.2.3:8000", "http://search.example:8000"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", PROXY)


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        (LOOPBACK, "", None),
        (LOOPBACK, "127.0.0.0/8", None),
        ("http://127.8.8.8:8000", "", None),
        ("http://localhost:8000", "", None),
        ("http://[::1]:8000", "", None),
        (INSIDE, "", PROXY),
        (INSIDE, "localhost, 10.0.0.0/8", None),
        (INSIDE, "10.2.0.0/16", PROXY),
        (INSIDE, "10.1.2.3", None),
        (INSIDE, "10.1.2.3:8000", None),
        (INSIDE, "10.1.2.3:9000", PROXY),
        ("http://[fd00::1]:8000", "", PROXY),
        ("http://[fd00::1]:8000", "fd00::1", None),
        ("http://[fd00::1]:8000", "fd00::/8", None),
        (INSIDE, "fd00::/8,*,", PROXY),
        (OUTSIDE, "10.0.0.0/8", PROXY),
        (OUTSIDE, ".example", None),
        (OUTSIDE, "*", None),
        ("https://search.example", "", None),
    ],
)
def test_servers_of_this_machine_and_of_no_proxy_are_asked_directly(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, expected: str | None
) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_before(url) == expected
    assert RetrieverHttpClient(url).proxy == expected


def test_proxy_without_a_scheme_is_an_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    assert proxy_before(OUTSIDE) == PROXY


@both_ways
@pytest.mark.parametrize("no_proxy", ["", "127.0.0.0/8", "fd00::/8"])
def test_search_on_this_machine_goes_to_no_proxy(
    monkeypatch: pytest.MonkeyPatch, server: ScriptedServer, search: Search, no_proxy: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("no_proxy", no_proxy)
    assert search(RetrieverHttpClient(server.url, max_attempts=1), ["lion"], 1) == FakeEngine().search(
        ["lion"], 1
    )


@both_ways
def test_search_elsewhere_goes_through_the_proxy(
    monkeypatch: pytest.MonkeyPatch, server: ScriptedServer, search: Search
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.script = [(200, {}, b'{"results": [{"hits": []}]}')]
    nothing: list[list[Hit]] = [[]]
    assert search(RetrieverHttpClient(OUTSIDE, max_attempts=1), ["lion"], 1) == nothing
    ((path, _, _),) = server.requests
    assert path == f"{OUTSIDE}/search"


@both_ways
@pytest.mark.parametrize(
    ("answer", "error"),
    [((502, {}, b"no such host"), RetrieverUnavailable), ((403, {}, b"not allowed"), RetrieverError)],
)
def test_failure_behind_a_proxy_names_it_and_not_its_password(
    monkeypatch: pytest.MonkeyPatch,
    server: ScriptedServer,
    search: Search,
    answer: tuple[int, dict[str, str], bytes],
    error: type[Exception],
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:secret@"))
    server.script = [answer]
    with pytest.raises(error, match=f"through the proxy {server.url}") as told:
        search(RetrieverHttpClient(OUTSIDE, max_attempts=1), ["lion"], 1)
    assert "secret" not in str(told.value)


def test_proxy_that_nobody_listens_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(RetrieverUnavailable, match=r"through the proxy http://127\.0\.0\.1:9"):
        RetrieverHttpClient(OUTSIDE, max_attempts=1).search(["lion"], 1)


@pytest.mark.parametrize("proxy", ["gopher://proxy.example", "socks4://proxy.example"])
def test_proxy_that_cannot_be_gone_through_is_refused(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(RetrieverError, match=f"cannot be asked through the proxy {proxy}"):
        RetrieverHttpClient(OUTSIDE)
