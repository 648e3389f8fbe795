"""Flashbacks: prompts of old tasks with what the old model wrote behind them, and their place in optimiser steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.core.agents.search import SEARCHER
from pipeline.core.errors import RunError, UserError
from pipeline.core.records import Episode, Example, Question, count_stop_reasons
from pipeline.core.weighing import Weighted

FLASHBACK = "flashback"
"""The role of these examples."""


@dataclass(frozen=True, slots=True)
class Flashbacks:
    """What the old model wrote for the prompt of an old task, as it is."""

    outputs = (FLASHBACK,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        turns = [episode.turn(SEARCHER) for episode in episodes]
        whole = [turn for turn in turns if not turn.stop_reason.is_infrastructure and turn.loss_mask.any()]
        examples = [replace(Example.of(turn), role=FLASHBACK) for turn in whole]
        return Weighted(
            {FLASHBACK: examples}, {"kept": len(examples), "stop_reasons": count_stop_reasons(turns)}
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        stops: Counter[str] = Counter()
        for row in statistics:
            stops.update(row["stop_reasons"])
        if not (kept := sum(row["kept"] for row in statistics)):
            raise RunError(
                "the old model wrote nothing for any prompt of an old task: there is nothing to keep. It ended with "
                f"{', '.join(f'{reason} ({number})' for reason, number in stops.items() if number)}"
            )
        return {"flashbacks": kept, "stop_reasons": dict(stops)}


def old_and_new(
    training: Sequence[Question], old_hops: Collection[int], prompts: int, rng: np.random.Generator
) -> tuple[list[Question], list[Question]]:
    """Some questions of the old tasks, at most `prompts`, and all of the new ones; without `hops` one is new.

    Raises:
        UserError: there are none of one kind.
    """
    old = [question for question in training if question.hops in old_hops]
    new = [question for question in training if question.hops not in old_hops]
    if not old or not new:
        raise UserError(
            f"flashback.old_hops is {list(old_hops)}: of {len(training)} training questions {len(old)} are of old "
            f"tasks and {len(new)} of new ones, and both are needed; name other numbers of reasoning steps, or give "
            "the questions' hops in data.train"
        )
    return [old[k] for k in rng.permutation(len(old))[:prompts]], new


def in_turns(
    kept: Sequence[Example], weighted: int, per_step: int, batch_size: int, rng: np.random.Generator
) -> list[Example]:
    """As many of the flashbacks, in turns, as the optimiser steps over so many weighted examples take: `per_step` of
    the `batch_size` examples of each."""
    steps = math.ceil(weighted / (batch_size - per_step))
    order = rng.permutation(len(kept))
    chosen = [kept[order[n % len(kept)]] for n in range(steps * per_step)]
    return [replace(one, id=f"{FLASHBACK}/{n}", unit=f"{FLASHBACK}/{n}") for n, one in enumerate(chosen)]
