"""A client of the HTTP service, and of any Search-R1 retrieval server.

Guarantees:
- a search is answered with hits, or raises `RetrieverUnavailable` (no attempt succeeded) or `RetrieverError`
  (the request or the address is at fault; not tried again), each within a bounded time;
- every query gets the hits of its own: a reply that does not fit the request is an error, never cut or filled up;
- connections are kept and used again; a client may be used from many threads, and its coroutines from any event
  loop.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import httpx

from retriever_service.backoff import Backoff
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions, check_request
from retriever_service.service.documents import documents_hits
from retriever_service.service.proxies import proxy_before, without_password
from retriever_service.service.wire import LEAST_DEADLINE_S

logger = logging.getLogger(__name__)

Dialect = Literal["native", "search-r1"]
Transport = TypeVar("Transport", httpx.HTTPTransport, httpx.AsyncHTTPTransport)

_PATHS: dict[Dialect, str] = {"native": "/search", "search-r1": "/retrieve"}
_TRY_AGAIN = frozenset({408, 429, *range(500, 600)})
_MOST_CONNECTIONS = 512
_IDLE_S = 30.0
_SHOWN_CHARS = 300


class _TryAgain(Exception):
    """An attempt that failed, and might not fail the next time."""

    def __init__(self, cause: str, retry_after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class _Attempt:
    """One attempt of a search: as a context manager it notes the failures that may be tried again."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        """To wait before it."""
        self.reply: Any = None
        self.failure: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, httpx.RequestError | TimeoutError | _TryAgain):
            self.failure = error
        return self.failure is not None


class RetrieverHttpClient:
    """Searches over HTTP; `search` blocks, `asearch` is for asyncio.

    Args:
        url: of the server, without a path: "http://127.0.0.1:8000".
        dialect: `native` for our own server; `search-r1` for a server of that contract, which knows a query and
            k only, and whose documents may have no ids: such a passage has an empty one (see `documents`).
        timeout_s: an attempt is given up after so many seconds. A blocking one may take longer by as much again
            while it connects, while it sends, and while it waits for the head of the reply: each has its own.
        max_attempts: attempts per search.
        backoff_s: mean pause before the second attempt, in seconds; it doubles with each further one and is
            drawn between half and one and a half of that, so that clients do not return all at once. If the
            server names a later time it is that, up to `timeout_s`.
        token: sent as bearer token.
        seed: of the jitter.

    Proxies are those of the environment where it searches, as `proxies.proxy_before` understands it.

    Raises:
        RetrieverError: an address that is none, or a proxy before it that httpx cannot go through.
    """

    def __init__(
        self,
        url: str,
        dialect: Dialect = "native",
        *,
        timeout_s: float = 60.0,
        max_attempts: int = 4,
        backoff_s: float = 1.0,
        token: str | None = None,
        seed: int | None = None,
    ) -> None:
        if not _is_address(url):
            raise RetrieverError(f"retriever address {url!r}: expected http://HOST:PORT")
        if dialect not in _PATHS:
            raise RetrieverError(f"retriever dialect {dialect!r}: there are {', '.join(_PATHS)}")
        if max_attempts < 1 or timeout_s <= 0:
            raise RetrieverError(f"a search needs attempts and time, got {max_attempts} of {timeout_s} s")
        self.url = url.rstrip("/")
        self.dialect = dialect
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._backoff = Backoff(backoff_s, seed)
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout_s,
            "headers": {} if token is None else {"Authorization": f"Bearer {token}"},
        }
        self._blocking: httpx.Client | None = None
        self._by_loop: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self._new_transport(httpx.HTTPTransport).close()

    def __getstate__(self) -> dict[str, Any]:
        # Connections stay where they are; the copy makes its own.
        return self.__dict__ | {"_blocking": None, "_by_loop": {}}

    @property
    def proxy(self) -> str | None:
        """Through which the server is asked, without a password; None for a direct connection."""
        proxy = proxy_before(self.url)
        return None if proxy is None else without_password(proxy)

    @property
    def fingerprint(self) -> str:
        """Of what the server searches now. A Search-R1 server has none to tell: then its address stands for it.

        Raises:
            RetrieverError, RetrieverUnavailable: as `search`.
        """
        if self.dialect == "search-r1":
            return f"search-r1 {self.url}"
        reply = self._call("GET", "/info", None)
        if not isinstance(reply, dict) or not isinstance(reply.get("index"), str):
            raise self._strange(reply)
        return str(reply["index"])

    def search(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        """The best `k` passages of each query, best first.

        Raises:
            RetrieverError: the request is at fault, or the reply is not that of such a server.
            RetrieverUnavailable: no attempt succeeded.
        """
        body = self._body(queries, k, options)
        return self._hits(self._call("POST", _PATHS[self.dialect], body), len(queries), k) if queries else []

    async def asearch(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        """As `search`."""
        body = self._body(queries, k, options)
        if not queries:
            return []
        client = self._async_client()
        for attempt in self._attempts():
            await asyncio.sleep(attempt.pause_s)
            with attempt:
                async with asyncio.timeout(self._timeout_s):
                    attempt.reply = self._judge(await client.post(_PATHS[self.dialect], json=body))
        return self._hits(attempt.reply, len(queries), k)

    def close(self) -> None:
        """Close the connections of `search`; those of `asearch` end with `aclose`, or on their own when idle."""
        if self._blocking is not None:
            self._blocking.close()
            self._blocking = None

    async def aclose(self) -> None:
        """Close the connections that `asearch` made in this event loop."""
        client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the server replies with."""
        if self._blocking is None:
            self._blocking = httpx.Client(**self._options, transport=self._new_transport(httpx.HTTPTransport))
        for attempt in self._attempts():
            time.sleep(attempt.pause_s)
            with attempt:
                attempt.reply = self._judge(self._request(self._blocking, method, path, body))
        return attempt.reply

    def _request(
        self, client: httpx.Client, method: str, path: str, body: dict[str, Any] | None
    ) -> httpx.Response:
        """As `client.request`, whose timeout begins anew with every piece of a reply that trickles in."""
        give_up = time.monotonic() + self._timeout_s
        with client.stream(method, path, json=body) as response:
            content = bytearray()
            for piece in response.iter_raw():
                content += piece
                if time.monotonic() > give_up:
                    raise TimeoutError(f"the reply was not whole after {self._timeout_s} s")
            return httpx.Response(
                response.status_code,
                headers=response.headers,
                content=bytes(content),
                request=response.request,
            )

    def _attempts(self) -> Iterator[_Attempt]:
        """Attempts until one of them succeeds.

        Raises:
            RetrieverUnavailable: none did.
        """
        attempt = _Attempt(0.0)
        for number in range(1, self._max_attempts + 1):
            yield attempt
            if attempt.failure is None:
                return
            failure = attempt.failure
            if number < self._max_attempts:  # the last one is told by the error
                logger.warning(f"{self.url}, attempt {number}/{self._max_attempts}: {failure!r}")
            asked_s = getattr(failure, "retry_after_s", 0.0)
            attempt = _Attempt(self._backoff.pause_s(number, asked_s=asked_s, most_s=self._timeout_s))
        raise RetrieverUnavailable(
            f"no answer from {self.url}{self._through} in {self._max_attempts} attempts of {self._timeout_s} s; the "
            f"last failure: {failure!r}"
        ) from failure

    def _async_client(self) -> httpx.AsyncClient:
        # Connections belong to the event loop that made them.
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            self._by_loop = {known: it for known, it in self._by_loop.items() if not known.is_closed()}
            self._by_loop[loop] = httpx.AsyncClient(
                **self._options, transport=self._new_transport(httpx.AsyncHTTPTransport)
            )
        return self._by_loop[loop]

    def _new_transport(self, kind: Callable[..., Transport]) -> Transport:
        """With a transport of ours httpx does not look for proxies itself."""
        limits = httpx.Limits(
            max_connections=_MOST_CONNECTIONS,
            max_keepalive_connections=_MOST_CONNECTIONS,
            keepalive_expiry=_IDLE_S,
        )
        try:
            return kind(limits=limits, proxy=proxy_before(self.url))
        except (httpx.InvalidURL, ImportError, ValueError) as error:
            raise RetrieverError(
                f"{self.url} cannot be asked through the proxy {self.proxy} ({error}); mend http_proxy, https_proxy or "
                "all_proxy, or name the host in no_proxy"
            ) from error

    @property
    def _through(self) -> str:
        """Words of messages about what may be the proxy's fault."""
        return f" through the proxy {self.proxy}" if self.proxy else ""

    def _body(self, queries: Sequence[str], k: int, options: SearchOptions) -> dict[str, Any]:
        check_request(queries, k)
        if self.dialect == "search-r1":
            if options != DEFAULT_OPTIONS:
                raise RetrieverError(
                    f"{self.url}: a Search-R1 server knows a query and k only, not {options}; use the native dialect"
                )
            return {"queries": list(queries), "topk": k, "return_scores": True}
        return {
            "queries": list(queries),
            "k": k,
            "method": options.method,
            "rerank": options.rerank,
            "filter": {} if options.where is None else options.where.to_json(),
            "exclude": sorted(options.exclude),
            "distinct": options.distinct,
            # Nobody waits for it any longer than this.
            "deadline_s": max(self._timeout_s, LEAST_DEADLINE_S),
        }

    def _judge(self, response: httpx.Response) -> Any:
        """The JSON of a reply.

        Raises:
            _TryAgain: there is none yet.
            RetrieverError: there will be none.
        """
        if response.status_code in _TRY_AGAIN:
            raise _TryAgain(f"status {response.status_code}: {_detail(response)}", _retry_after_s(response))
        if response.status_code != 200:
            raise RetrieverError(
                f"{response.url}{self._through} answered {response.status_code}: {_detail(response)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise self._strange(response.text) from error

    def _hits(self, reply: Any, num_queries: int, k: int) -> list[list[Hit]]:
        try:
            if self.dialect == "native":
                results = [[_native_hit(hit) for hit in result["hits"]] for result in reply["results"]]
            else:
                results = [documents_hits(documents, k, self.url) for documents in reply["result"]]
        except RetrieverError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._strange(reply) from error
        if len(results) != num_queries:
            raise RetrieverError(
                f"{self.url} answered {len(results)} of {num_queries} queries; it is not to be trusted"
            )
        return results

    def _strange(self, reply: Any) -> RetrieverError:
        return RetrieverError(
            f"{self.url}{self._through} does not answer as a {self.dialect} server does: "
            f"{str(reply)[:_SHOWN_CHARS]!r}; are address and dialect right?"
        )


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _native_hit(hit: dict[str, Any]) -> Hit:
    return _checked(Passage(hit["id"], hit["title"], hit["text"], hit["metadata"]), hit["score"])


def _checked(passage: Passage, score: Any) -> Hit:
    """A hit of what a server said.

    Raises:
        TypeError, ValueError: not of the right types, or text that is not valid Unicode.
    """
    for text in (passage.id, passage.title, passage.text):
        str.encode(text)
    return Hit(passage, float(score))


def _detail(response: httpx.Response) -> str:
    """What the server says is wrong: ours, FastAPI's, or whatever there is."""
    try:
        return str(response.json()["detail"])[:_SHOWN_CHARS]
    except (ValueError, KeyError, TypeError):
        return response.text[:_SHOWN_CHARS]


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds, or a date, by RFC 9110; 0 where there is none."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
