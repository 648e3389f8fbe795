"""Stand-in engines take the time that the arithmetic says, also where nobody waits."""

from __future__ import annotations

import asyncio

import pytest

from bench.stand_in import Engine, Pace, in_no_time

PACE = Pace(step_s=1.0, step_per_sequence_s=0.5)


def test_a_sequence_alone_takes_its_steps() -> None:
    assert in_no_time(lambda: Engine(PACE).generate(10)) == pytest.approx(15.0)


def test_sequences_slow_each_other_down_while_they_share_steps() -> None:
    ends: dict[int, float] = {}

    async def work() -> None:
        engine, loop = Engine(PACE), asyncio.get_running_loop()

        async def sequence(tokens: int, delay: float) -> None:
            await asyncio.sleep(delay)
            await engine.generate(tokens)
            ends[tokens] = loop.time()

        await asyncio.gather(sequence(10, 0.0), sequence(4, 3.0))

    in_no_time(work)
    # Two steps alone of 1.5 s, four together of 2 s, and four alone again.
    assert ends[4] == pytest.approx(3.0 + 8.0)
    assert ends[10] == pytest.approx(3.0 + 8.0 + 6.0)
