"""Episodes in lock-step: stand-ins for the model and the retriever note when each of them is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bench import asked
from bench.asked import Asked, LockStep
from pipeline.core.agents.search import SEARCHER


class Model:
    tokenizer, max_length, version, records_proposal = None, 100, 0, False

    def __init__(self, noted: list[str]) -> None:
        self.noted = noted

    async def generate(self, *_: Any) -> None:
        self.noted.append("turn")
        await asyncio.sleep(0)

    async def token_logprobs(self, *_: Any) -> None:
        self.noted.append("score")


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6), golds=st.integers(0, 2))
def test_no_agent_begins_a_turn_or_searches_before_all_others_can(lengths: list[int], golds: int) -> None:
    noted: list[str] = []

    async def program(task: Any, roles: Any, retrieve: Any, *, sampling: Any, sample: int) -> None:
        for _ in range(lengths[sample] - 1):
            await roles[SEARCHER].generate([], None)
            await retrieve("query", 1)
        await roles[SEARCHER].generate([], None)
        await asyncio.gather(*(roles[SEARCHER].token_logprobs([], 1) for _ in range(golds)))

    async def retrieve(query: str, k: int) -> None:
        noted.append("search")

    async def lock_step() -> None:
        run: Any = LockStep(program)  # type: ignore[arg-type]
        task = SimpleNamespace(id="question")
        await run(task, {SEARCHER: Model(noted)}, retrieve, sampling=None, sample=0)

    asked.ASKED[:] = [Asked(None, None, sample) for sample in range(len(lengths))]  # type: ignore[arg-type]
    try:
        asyncio.run(asyncio.wait_for(lock_step(), 10))
    finally:
        asked.ASKED.clear()

    expected: list[str] = []
    for turn in range(max(lengths)):
        expected += ["turn"] * sum(length > turn for length in lengths)
        expected += ["search"] * sum(length > turn + 1 for length in lengths)
    assert noted == expected + ["score"] * (golds * len(lengths))
