"""Questions to a trained searcher: one that is watched step by step, a person's one after the other, a file of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol

from actors.answering import AnsweringAgent
from pipeline.commands.answerer import agent_of, run_of
from pipeline.core.agents.program import GREEDY, EngineError, Sampling
from pipeline.core.agents.search import Event, OnEvent
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.policies import Snapshot
from pipeline.core.records import StopReason, Trajectory, step_as_json
from pipeline.core.run import Json
from retriever_service import interrupts
from retriever_service.passages.evaluation import read_queries

AHEAD = 4
"""So many times the questions that the engine answers at once are begun before the first of them is shown."""
FEW = 10
"""So many may fail, whatever share of all that is."""

Say = Callable[[str], None]


class Answerer(Protocol):
    """Of `actors.answering.AnsweringAgent`, what answers; there it says what they raise."""

    def check(self, question: str) -> None: ...

    async def answer(self, question: str, sampling: Sampling, on_event: OnEvent) -> Trajectory: ...


def ask(
    question: str | None,
    questions: Path | None,
    model: str,
    index: Path | None,
    config: Config,
    display: Display,
    say: Say,
    *,
    run: Path | None = None,
    json_lines: bool = False,
) -> None:
    """Answer one question, those of a file, or each line of standard input.

    Args:
        questions: a file (`read_queries`), in place of `question`.
        index: None for the retriever of the configuration, or the index of the run that the model belongs to.
        config: its `agent` section says how to search; the model should have been trained with the same.
        run: of whose iterations this model is the best; None: the one that the model's path says, if any.
        say: told lines for a person to read; with `json_lines` an object per question.

    Raises:
        UserError, RetrieverError: no such model, index or file, no server that answers, or a question is too long.
        RunError: the engine does not start or was lost; or questions have no answer for reasons outside of the model.
    """
    if question is not None and not question.strip():
        raise UserError("the question is empty; say what you want to know")
    texts = None if questions is None else read_queries(questions)
    # A person's questions are not worth the graphs that a GPU's engine may compile.
    rollout = config.rollout if texts is not None else config.rollout.with_one(enforce_eager=True)
    config = config.model_copy(update={"rollout": rollout})
    agent = agent_of(Snapshot(0, model), run or run_of(model), index, config, display)

    async def main() -> None:
        async with started(agent, display) as at_once:
            if texts is not None:
                with display.progress("answering", len(texts), "questions") as advance:
                    await answer_all(
                        agent,
                        texts,
                        at_once,
                        lambda id_, answer: say(
                            _in_json({"id": id_, **answer}) if json_lines else in_words(answer)
                        ),
                        lambda done: advance.to(done, len(texts)),
                        max_failure_share=config.rollout.max_failure_share,
                    )
            elif question is not None:
                await _watch(agent, question, say, json_lines)
            else:
                await _converse(agent, display, say, json_lines)

    interrupts.run(main())


@asynccontextmanager
async def started(agent: AnsweringAgent, display: Display) -> AsyncIterator[int]:
    """The agent's engine and retriever are up until the block ends; gives how many questions it answers at once.

    Raises:
        RetrieverError: the index cannot be opened.
        RunError: the engine does not start.
    """
    try:
        with display.status("starting the retriever and vLLM"):
            try:
                at_once = await agent.start()
            except EngineError as error:
                raise RunError(str(error)) from error
            except asyncio.CancelledError:
                # An engine that is starting cannot be ended, but with the process.
                interrupt = interrupts.received()
                display.error(f"interrupted by {interrupt.name}")
                os._exit(interrupt.exit_code)
        yield at_once
    finally:
        await agent.close()


class EngineLost(RunError):
    """The engine died or hung; there are no further answers."""


async def answer_one(agent: Answerer, question: str, on_event: OnEvent = lambda event: None) -> Json:
    """One greedy answer; `on_event` is told of each step as it happens. Cancelled, it ends generation and search.

    Returns:
        `{"question", "answer", "stop_reason", "steps": [{"query", "hits": [{"id", "title", "text", "score"}], "record",
        "selected", "action", "result"}]}`, as in `Step`; `failure` says what infrastructure did, if it did.

    Raises:
        UserError: the question is too long.
        EngineLost: the engine was.
    """
    agent.check(question)
    trajectory = await agent.answer(question, GREEDY, on_event)
    if trajectory.stop_reason is StopReason.ENGINE_ERROR:
        raise EngineLost(f"the engine was lost: {trajectory.detail}")
    return as_json(question, trajectory)


async def answer_all(
    agent: Answerer,
    questions: Mapping[str, str],
    at_once: int,
    on_answer: Callable[[str, Json], None],
    on_progress: Callable[[int], None],
    *,
    max_failure_share: float,
) -> None:
    """Answers to many questions.

    Args:
        questions: text by id.
        at_once: answers that are made at a time.
        on_answer: told id and answer, in the order of the questions, as soon as all before are there.
        on_progress: told how many have been answered.
        max_failure_share: of those that are there. With more failures than that it ends at once.

    Raises:
        UserError: a question is too long.
        EngineLost: the engine was.
        RunError: questions have no answer for reasons outside of the model.
    """
    done, failures, last = 0, 0, ""
    async with aclosing(_in_order(agent, questions, at_once, on_progress)) as answers:
        async for id_, answer in answers:
            on_answer(id_, answer)
            done += 1
            if "failure" in answer:
                failures, last = failures + 1, answer["failure"]
                if failures > max(FEW, max_failure_share * done):
                    break
    if failures:
        raise RunError(
            f"{failures} of {done} questions have no answer for reasons outside of the model; last: {last}"
        )


async def _in_order(
    agent: Answerer, questions: Mapping[str, str], at_once: int, on_progress: Callable[[int], None]
) -> AsyncGenerator[tuple[str, Json], None]:
    slots, done = asyncio.Semaphore(at_once), 0

    async def one(text: str) -> Json:
        nonlocal done
        async with slots:
            answer = await answer_one(agent, text)
        done += 1
        on_progress(done)
        return answer

    waiting = iter(questions.items())
    begun: deque[tuple[str, asyncio.Task[Json]]] = deque()
    try:
        while True:
            for id_, text in islice(waiting, AHEAD * at_once - len(begun)):
                begun.append((id_, asyncio.create_task(one(text))))
            if not begun:
                return
            first, answering = begun[0]
            yield first, await answering
            begun.popleft()
    finally:
        rest = [answering for _, answering in begun]
        for answering in rest:
            answering.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


async def _watch(agent: Answerer, question: str, say: Say, json_lines: bool) -> None:
    """One answer, shown while it is made.

    Raises:
        RunError: there is none, for reasons outside of the model.
    """
    answer = await answer_one(agent, question, lambda event: None if json_lines else show(event, say))
    if json_lines:
        say(_in_json(answer))
    if "failure" in answer:
        raise RunError(f"no answer: {answer['failure']}")


async def _converse(agent: Answerer, display: Display, say: Say, json_lines: bool) -> None:
    """An answer for each line of standard input, told behind it where nobody has typed it here. A person may ask on
    behind a question that has none."""
    for text in _lines():
        if not (json_lines or sys.stdin.isatty()):
            say(text)
        try:
            await _watch(agent, text, say, json_lines)
        except (RunError, UserError) as error:
            if isinstance(error, EngineLost) or not sys.stdin.isatty():
                raise
            display.error(str(error))


def _lines() -> Iterator[str]:
    """Of standard input, those that say something. A person is asked for each of them, and ends with Ctrl-D."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401  `input` then knows the arrow keys and what was asked before

    while True:
        try:
            line = input("Your question (Ctrl-D ends): ").strip()
        except EOFError:
            return
        if line:
            yield line


def show(event: Event, say: Say) -> None:
    """One event of a trajectory in words."""
    if event.kind == "search":
        for rank, hit in enumerate(event.hits, start=1):
            say(f"    [{rank}] {hit.score:.2f}  {hit.passage.title}: {hit.passage.text}")
        if not event.hits:
            say("    (nothing was found)")
    elif event.kind == "stop":
        if event.text != StopReason.ANSWERED:
            say(f"stopped: {event.text}")
    else:
        say(f"{event.kind:>7}  {event.text}")


def in_words(answer: Json) -> str:
    """A question and its answer, or why there is none."""
    none = f"(no answer: {answer.get('failure', answer['stop_reason'])})"
    return f"{answer['question']}\n    {answer['answer'] or none}"


def _in_json(answer: Json) -> str:
    return json.dumps(answer, ensure_ascii=False)


def as_json(question: str, trajectory: Trajectory) -> Json:
    """A trajectory for programs."""
    failure = trajectory.stop_reason.is_infrastructure
    return {
        "question": question,
        "answer": trajectory.answer,
        "stop_reason": trajectory.stop_reason.value,
        "steps": [step_as_json(step) for step in trajectory.steps],
        **({"failure": f"{trajectory.stop_reason.value}: {trajectory.detail}"} if failure else {}),
    }
