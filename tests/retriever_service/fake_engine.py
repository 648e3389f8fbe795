"""A search engine without index and model, to be served; and a server process around it.

python -m tests.retriever_service.fake_engine '{"port": 0, ...}'    (settings as JSON)
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import (
    DEFAULT_OPTIONS,
    Hit,
    SearchOptions,
    check_request,
    normalise_query,
)

ANIMALS = (
    Passage("a0", "Lion", "the lion lives on the savanna", {"legs": 4, "home": "land"}),
    Passage("a1", "Tiger", "the tiger lives in the jungle", {"legs": 4, "home": "land"}),
    Passage("a2", "Otter", "the otter swims in rivers", {"legs": 4, "home": "water"}),
    Passage("a3", "Eagle", "the eagle nests on cliffs", {"legs": 2, "home": "air"}),
    Passage("a4", "", "twins look the same"),
    Passage("a5", "Two\nlines", "twins look the same", {"legs": 2}),
)
SLOW = "slow"
"""A query that takes half a second."""


class FakeEngine:
    """Scores passages by the words that they share with the query, and records every search.

    Scores also depend on k, as the hits of an approximate index do: searches for different k must not be mixed. It
    holds a search until `gate` is open, and fails on the query "poison".
    """

    def __init__(self, passages: Sequence[Passage] = ANIMALS) -> None:
        self.on_stage: Callable[[str, float], None] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.held = False
        """Whether a search waits at the gate."""
        self.is_warm = False
        self.searches: list[list[str]] = []
        self.threads: set[str] = set()
        self._passages = {passage.id: passage for passage in passages}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(list(self._passages.values())).encode()).hexdigest()

    def search(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        check_request(queries, k)
        self.held = True
        opened = self.gate.wait(timeout=30)
        self.held = False
        assert opened, "the test never opened the gate"
        self.threads.add(threading.current_thread().name)
        self.searches.append(list(queries))
        if "poison" in queries:
            raise MemoryError("too much")
        if options.method == "bm25":
            raise RetrieverError("there is no word index")
        if SLOW in queries:
            time.sleep(0.5)
        if self.on_stage is not None:
            self.on_stage("search", 0.001)
        return [self._best(normalise_query(query), k, options) for query in queries]

    def _best(self, query: str, k: int, options: SearchOptions) -> list[Hit]:
        words = set(query.lower().split())
        hits = [
            Hit(passage, len(words & set(f"{passage.title} {passage.text}".lower().split())) + 1 / (k + 1))
            for passage in self._passages.values()
            if passage.id not in options.exclude and fulfils(passage, options.where)
        ]
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    def first_search(self) -> None:
        self.is_warm = True

    def add(self, passages: Sequence[Passage]) -> int:
        for passage in passages:
            if passage.id in self._passages:
                raise RetrieverError(f"there is a passage {passage.id!r} already")
        self._passages |= {passage.id: passage for passage in passages}
        return len(self._passages)

    def delete(self, ids: Sequence[str]) -> int:
        for id_ in ids:
            if id_ not in self._passages:
                raise RetrieverError(f"there is no passage {id_!r}")
        for id_ in ids:
            self._passages.pop(id_, None)
        return len(self._passages)

    def refresh(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return {"count": len(self._passages), "factory": "none"}


def fulfils(passage: Passage, where: Filter | None) -> bool:
    """For filters of single values; no passage is within a range."""
    conditions = {} if where is None else where.to_json()
    return all(
        isinstance(accepted, list) and passage.metadata.get(field) in accepted
        for field, accepted in conditions.items()
    )


def main() -> None:
    from retriever_service.service.server import ServerSettings, serve

    serve(
        ServerSettings(**json.loads(sys.argv[1])), FakeEngine, on_listening=lambda url: print(url, flush=True)
    )


if __name__ == "__main__":
    main()
