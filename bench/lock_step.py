"""Search trajectories on a transformers model, without engines and actors: all of a batch together, turn by turn.

As loops that were not made for agents do it: all trajectories write a turn, all queries are searched in one batch, and
so on; each turn computes the whole context anew. For `bench.trl_grpo`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import torch

from pipeline.core.agents.program import Completion, Sampling
from pipeline.core.agents.search import SearchAgent
from pipeline.core.records import Question, Trajectory
from pipeline.core.renderer import Renderer
from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine

ROWS = 64
"""Contexts that are continued at once."""

Turn = tuple[list[int], Sampling]


class Writer:
    """Continues contexts with `generate`, those of similar length beside each other.

    What is drawn depends on torch's generator alone, not on the seeds of the turns. Log-probabilities are not recorded:
    those of a completion are 0.
    """

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self._model, self._renderer = model, renderer
        self._tokenizer = renderer.tokenizer

    def write(self, turns: Sequence[Turn]) -> list[Completion]:
        """Each context's continuation, in their order."""
        found: dict[int, Completion] = {}
        order = sorted(range(len(turns)), key=lambda n: (turns[n][1].stop, len(turns[n][0])))
        while order:
            stop = turns[order[0]][1].stop
            some = [n for n in order[:ROWS] if turns[n][1].stop == stop]
            found |= zip(some, self._together([turns[n] for n in some], stop), strict=True)
            order = order[len(some) :]
        return [found[n] for n in range(len(turns))]

    def _together(self, turns: Sequence[Turn], stop: tuple[str, ...]) -> list[Completion]:
        longest, pad = max(len(ids) for ids, _ in turns), self._tokenizer.pad_token_id
        sampling = turns[0][1]
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        trains = self._model.training
        self._model.eval()
        with torch.no_grad():
            rows = self._model.generate(
                input_ids=torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in turns]),
                attention_mask=torch.tensor(
                    [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in turns]
                ),
                max_new_tokens=max(own.max_tokens for _, own in turns),
                stop_strings=list(stop),
                tokenizer=self._tokenizer,
                pad_token_id=pad,
                eos_token_id=self._tokenizer.eos_token_id,
                **how,
            )
        self._model.train(trains)
        return [
            self._completion(row[longest:].tolist(), own) for row, (_, own) in zip(rows, turns, strict=True)
        ]

    def _completion(self, ids: list[int], sampling: Sampling) -> Completion:
        """Without what stands behind its end: padding, while others were not at theirs."""
        ids, eos = ids[: sampling.max_tokens], self._tokenizer.eos_token_id
        if eos in ids:
            ids = ids[: ids.index(eos) + 1]
        text = self._renderer.decode(ids)
        ends = [(text.index(stop) + len(stop), stop) for stop in sampling.stop if stop in text]
        if not ends:
            return Completion(ids, [0.0] * len(ids), text, None, "eos" if eos in ids else "length")
        end, stop = min(ends)
        written = (ids[:n] for n in range(1, len(ids) + 1))
        own = next(some for some in written if self._renderer.decode(some).startswith(text[:end]))
        return Completion(own, [0.0] * len(own), text[:end], stop, "stop")


class LockStep:
    """Runs search agents together. What they ask for waits until all ask.

    Args:
        model: a causal language model of transformers.
        engine: what is searched.
        max_length: longest context in tokens.
        keeps_mistakes: see `SearchAgent`.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        engine: SearchEngine,
        max_length: int,
        *,
        keeps_mistakes: bool = False,
    ) -> None:
        self._writer, self._engine = Writer(model, renderer), engine
        self._agent = SearchAgent(
            renderer, self, self._search, max_length=max_length, keeps_mistakes=keeps_mistakes
        )
        self._going = 0
        self._searches: list[tuple[tuple[str, int], asyncio.Future[Sequence[Hit]]]] = []
        self._turns: list[tuple[Turn, asyncio.Future[Completion]]] = []

    def run(self, tasks: Sequence[tuple[Question, int]], sampling: Sampling) -> list[Trajectory]:
        """A trajectory for each question and number of a sample, in their order."""
        return asyncio.run(
            self._all([self._agent.run(task, sampling=sampling, sample=sample) for task, sample in tasks])
        )

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """What an agent asks for; see `Generator`."""
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._turns.append(((list(prompt_ids), sampling), answer))
        self._go_on()
        return await answer

    async def _search(self, query: str, k: int) -> Sequence[Hit]:
        answer: asyncio.Future[Sequence[Hit]] = asyncio.get_running_loop().create_future()
        self._searches.append(((query, k), answer))
        self._go_on()
        return await answer

    async def _all(self, runs: Sequence[Coroutine[Any, Any, Trajectory]]) -> list[Trajectory]:
        self._going = len(runs)

        async def one(run: Coroutine[Any, Any, Trajectory]) -> Trajectory:
            trajectory = await run
            self._going -= 1
            self._go_on()
            return trajectory

        return await asyncio.gather(*map(one, runs))

    def _go_on(self) -> None:
        """Searches first: who has found something can write with the others."""
        if len(self._searches) + len(self._turns) < self._going:
            return
        if self._searches:
            searches, self._searches = self._searches, []
            queries = [query for (query, _), _ in searches]
            hits = self._engine.search(queries, max(k for (_, k), _ in searches))
            for ((_, k), found), best in zip(searches, hits, strict=True):
                found.set_result(best[:k])
        elif self._turns:
            turns, self._turns = self._turns, []
            completions = self._writer.write([turn for turn, _ in turns])
            for (_, written), completion in zip(turns, completions, strict=True):
                written.set_result(completion)
