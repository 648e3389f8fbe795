"""A served agent under many conversations at once, against an engine alone.

    python -m bench.serving [--model DIR] [--conversations 64] [--questions 256] [--runs 5] [--json FILE]

Ours is `exsearch serve` in a process of its own, asked by the official client over HTTP; every answer is streamed. The
limit is an engine with the same options, asked for the same turns by nobody who parses, searches or speaks HTTP
between them, as many conversations at once. Answers are greedy. Each round has questions of its own, so that no answer
is in the server's cache; before the limit the engine loads its weights anew, which empties its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

from actors.answering import engine_options_of
from actors.engine import VllmEngine
from actors.rollout import LocalModel
from actors.session import actor_environment
from bench.asked import ASKED, Again, Noting
from bench.measure import HEADER, RUNS, TINY, Brevity, Ratio, circumstances, print_table, write_ratios
from pipeline.commands.demo import demo_config
from pipeline.core.agents.program import GREEDY
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config
from pipeline.core.data.world.writer import write_world
from pipeline.core.errors import UserError
from pipeline.core.records import Question
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine

CONVERSATIONS, QUESTIONS, FEW = 64, 256, 8
READY_S = 600.0
OF_AN_AGENT = ("documents", "max_searches", "max_document_tokens", "max_turn_tokens")


@dataclass
class Round:
    """What came of one side: tokens written, seconds, and of the server seconds to the first step of each answer."""

    tokens: int
    seconds: float
    first: list[float]
    processor: dict[str, float]
    """Seconds of processor time, by what used it."""


class Account:
    """Processor time of the processes of one side, from now on."""

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self._processes = processes
        self._before = self._used()

    def since(self) -> dict[str, float]:
        return {name: seconds - self._before[name] for name, seconds in self._used().items()}

    def _used(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: used.user + used.system for name, used in times.items()}


def engine_of(owner: psutil.Process) -> psutil.Process:
    (engine,) = (
        child for child in owner.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()])
    )
    return engine


class Server:
    """`exsearch serve`, as a client meets it."""

    def __init__(self, url: str, process: psutil.Process, conversations: int) -> None:
        self._processes = {"client": psutil.Process(), "server": process, "engine": engine_of(process)}
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=READY_S, max_retries=0
        )
        self._slots = asyncio.Semaphore(conversations)

    async def round(self, questions: Sequence[str]) -> Round:
        """Any error of any answer is raised."""
        began, account = time.perf_counter(), Account(self._processes)
        answers = await asyncio.gather(*map(self._ask, questions))
        seconds = time.perf_counter() - began
        return Round(
            sum(tokens for tokens, _ in answers), seconds, [first for _, first in answers], account.since()
        )

    async def _ask(self, question: str) -> tuple[int, float]:
        async with self._slots:
            began, first, tokens = time.perf_counter(), None, None
            stream = await self._client.chat.completions.create(
                model="exsearch",
                messages=[{"role": "user", "content": question}],
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if first is None and chunk.choices and chunk.choices[0].delta.model_extra:
                    first = time.perf_counter() - began
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
        assert tokens is not None and first is not None
        return tokens, first


class Alone:
    """An engine, and the turns that were asked of it."""

    def __init__(self, config: Config, index: Path, conversations: int) -> None:
        self._config, self._conversations = config, conversations
        self._engine = VllmEngine(engine_options_of(config, config.model.path))
        self._index = SearchEngine.open(index)

    async def start(self) -> None:
        await self._engine.start(0)
        own = psutil.Process()
        self._processes = {"who asks": own, "engine": engine_of(own)}

    async def round(self, questions: Sequence[str]) -> Round:
        ASKED.clear()
        program, roles = Noting(SearchProgram(self._config.agent)), {SEARCHER: LocalModel(self._engine)}
        slots = asyncio.Semaphore(self._conversations)

        async def answer(text: str) -> int:
            async with slots:
                episode = await program(
                    Question("asked", text, ("",)), roles, self._search, sampling=GREEDY, sample=0
                )
            return int(episode.turn(SEARCHER).loss_mask.sum())

        tokens = sum(await asyncio.gather(*map(answer, questions)))
        await self._engine.reload(self._config.model.path, 0, READY_S)
        began, account = time.perf_counter(), Account(self._processes)
        await Again(self._conversations)(
            Question("all", "", ("",)), roles, self._search, sampling=GREEDY, sample=0
        )
        return Round(tokens, time.perf_counter() - began, [], account.since())

    async def _search(self, query: str, k: int) -> list[Hit]:
        (hits,) = await asyncio.to_thread(self._index.search, [query], k)
        return hits

    def close(self) -> None:
        self._engine.shutdown()


@contextmanager
def served(config: Config, index: Path, conversations: int) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its process, when it is ready; ended by SIGTERM behind the block."""
    agent = config.model_dump()["agent"]
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "serve",
        "--model",
        config.model.path,
        "--index",
        str(index),
    ]
    command += ["--port", "0", "--max-conversations", str(conversations), "--deadline", str(READY_S)]
    settings = [
        f"model.max_length={config.model.max_length}",
        *(f"agent.{key}={agent[key]}" for key in OF_AN_AGENT),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch) / "said"
        with said.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([*command, *settings], stderr=file)
        try:
            yield address_of(process, said), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def address_of(process: subprocess.Popen[bytes], said: Path) -> str:
    """Of `exsearch serve`, as it says on its standard error, when it is ready."""
    deadline, url = time.monotonic() + READY_S, ""
    while not url or not _is_ready(url):
        text = said.read_text(encoding="utf-8")
        assert time.monotonic() < deadline and process.poll() is None, f"not ready in time: {text[-4000:]}"
        if found := re.search(r"serving .* at (http://\S+)", text):
            url = found[1]
        time.sleep(0.5)
    return url


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


async def rounds(
    config: Config, index: Path, texts: Sequence[str], conversations: int, questions: int, runs: int
) -> list[tuple[Round, Round]]:
    """Both sides in turn, behind a round of each that does not count."""
    parts = [texts[first : first + questions] for first in range(0, len(texts), questions)][: runs + 1]
    alone = Alone(config, index, conversations)
    await alone.start()
    try:
        with served(config, index, conversations) as (url, process):
            server = Server(url, process, conversations)
            pairs = [(await server.round(part), await alone.round(part)) for part in parts]
    finally:
        alone.close()
    return pairs[1:]


def measure(model: Path, conversations: int, questions: int, runs: int) -> list[tuple[Round, Round]]:
    """On the demo's world, on cores."""
    os.environ.update(actor_environment(on_gpu=False))
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    with tempfile.TemporaryDirectory() as scratch:
        world, index = Path(scratch) / "world", Path(scratch) / "index"
        write_world(world, seed=0, size="small")
        build_index([str(world / "corpus.jsonl")], index, EncoderSpec("minilm"))
        rows = (world / "train.jsonl").read_text(encoding="utf-8").splitlines()
        config = demo_config(world, [f"model.path={model}", f"rollout.concurrency={conversations}"])
        texts = [json.loads(row)["question"] for row in rows]
        if (needed := questions * (runs + 1)) > len(texts):
            raise UserError(
                f"{runs} rounds and one before them need {needed} questions; there are {len(texts)}"
            )
        return asyncio.run(rounds(config, index, texts, conversations, questions, runs))


def ratio(pairs: Sequence[tuple[Round, Round]], conversations: int) -> Ratio:
    ours, limit = ([side.tokens / side.seconds for side in sides] for sides in zip(*pairs, strict=True))
    return Ratio(f"serve, {conversations} conversations", "an engine alone", "tokens", ours, limit, 0.8)


def run() -> list[Ratio]:
    """For the table of `python -m bench`."""
    questions, conversations = (FEW, FEW) if Brevity.is_on else (QUESTIONS, CONVERSATIONS)
    return [ratio(measure(TINY, conversations, questions, Brevity.runs()), conversations)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of a round")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="as of `python -m bench`")
    arguments, when = parser.parse_args(), circumstances()
    pairs = measure(arguments.model, arguments.conversations, arguments.questions, arguments.runs)
    found = ratio(pairs, arguments.conversations)
    print_table(HEADER, [found.cells()])
    if arguments.json is not None:
        write_ratios(arguments.json, [found], when)
    for side, sides in zip(("serve", "engine alone"), zip(*pairs, strict=True), strict=True):
        used = {name: statistics.median(one.processor[name] for one in sides) for name in sides[0].processor}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items())
        print(
            f"{side}: a round takes {statistics.median(one.seconds for one in sides):.1f} s; processor time: {parts}"
        )
    first = sorted(seconds for ours, _ in pairs for seconds in ours.first)
    print(
        f"{len(first)} answers without an error; seconds to the first step: median {statistics.median(first):.2f}, "
        f"99 of 100 within {first[int(0.99 * (len(first) - 1))]:.2f}"
    )


if __name__ == "__main__":
    main()
