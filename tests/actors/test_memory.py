"""What is sampled and waits to be weighed stays within bounds."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from actors.memory import BYTES_PER_TOKEN, Memory


@given(
    limit=st.integers(0, 5000),
    longest=st.integers(1, 20),
    tasks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 500)), max_size=60),
)
def test_what_waits_stays_below_the_limit_and_all_are_served(
    limit: int, longest: int, tasks: list[tuple[int, int]]
) -> None:
    """No episode is larger than a full context; only one task alone may take more."""

    async def run() -> int:
        memory, waiting, done = Memory(limit, longest), [], 0
        for episodes, size in tasks:
            reserving = asyncio.create_task(memory.reserve(episodes))
            await asyncio.sleep(0)
            while not reserving.done():
                assert waiting, "nobody is left to make room"
                memory.release(waiting.pop(0)[0])
                done += 1
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            waiting.append((episodes, min(size, BYTES_PER_TOKEN * longest) * episodes))
            memory.learn(*waiting[-1])
            assert len(waiting) == 1 or sum(size for _, size in waiting) <= limit
        return done + len(waiting)

    assert asyncio.run(run()) == len(tasks)


def test_episodes_that_are_larger_than_a_context_are_counted_by_the_largest() -> None:
    async def run() -> None:
        memory = Memory(1000 * BYTES_PER_TOKEN, longest=1)
        await memory.reserve(4)
        memory.learn(4, 4 * 100 * BYTES_PER_TOKEN)
        await memory.reserve(6)
        more = asyncio.create_task(memory.reserve(1))
        await asyncio.sleep(0)
        assert not more.done()
        memory.release(4)
        await asyncio.wait_for(more, 10)

    asyncio.run(run())
