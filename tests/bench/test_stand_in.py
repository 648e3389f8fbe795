"""Stand-in engines take the time that the arithmetic says, also where nobody waits."""

from __future__ import annotations

import asyncio

import pytest

from bench.scale import ideal_s, lock_step_s
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


def test_in_lock_step_nobody_searches_while_another_one_writes() -> None:
    one_turn = Pace(turns=1, search_s=100.0)
    assert lock_step_s(one_turn, workers=2, concurrency=4, number=2) == pytest.approx(
        ideal_s(one_turn, workers=2, concurrency=4, number=2), rel=0.01
    )
    paces = [Pace(turns=5, turn_tokens=20, search_s=search_s) for search_s in (0.0, 100.0)]
    in_lock_step = [lock_step_s(pace, workers=1, concurrency=80, number=20) for pace in paces]
    freely = [ideal_s(pace, workers=1, concurrency=80, number=20) for pace in paces]
    assert in_lock_step[0] > freely[0]
    # Its batch of 80 has trajectories of five turns, and four searches between them, as the longest of the others have.
    assert in_lock_step[1] - in_lock_step[0] == pytest.approx(400.0)
    assert freely[1] == pytest.approx(400.0, rel=0.05)
