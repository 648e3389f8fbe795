"""One question to a trained searcher, watched step by step. No Ray: one engine, and one index or its servers."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from actors.engine import EngineOptions, VllmEngine
from actors.placement import GPU_MEMORY_UTILIZATION
from actors.retriever import open_retriever
from pipeline.core.agents.search import Event, Sampling, SearchAgent
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.models import check_model, load_tokenizer
from pipeline.core.records import Question, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import Searched, await_servers
from pipeline.core.run import Json


def ask(
    question: str,
    model: str,
    index: Path | None,
    config: Config,
    display: Display,
    on_text: Callable[[str], None] = lambda text: None,
) -> Json:
    """Answer greedily.

    Args:
        index: None for the retriever of the configuration.
        config: its `agent` section says how to search; the model should have been trained with the same.
        on_text: told the trajectory while it unfolds, for people to read.

    Returns:
        `{"question", "answer", "stop_reason", "steps": [{"query", "hits": [{"id", "title", "text", "score"}],
        "record"}]}`.

    Raises:
        UserError, RetrieverError: no such model or index, or no server that answers.
    """
    check_model(model)
    _quieten_libraries()
    retrieve = open_retriever(_searched(index, config, display), config.retriever)
    renderer = Renderer(load_tokenizer(model), config.agent)

    async def run() -> Trajectory:
        engine = VllmEngine(
            EngineOptions(
                model=model,
                dtype=config.model.dtype,
                tensor_parallel_size=config.rollout.tensor_parallel_size,
                max_model_len=config.model.max_length,
                max_num_seqs=1,
                gpu_memory_utilization=config.rollout.gpu_memory_utilization or GPU_MEMORY_UTILIZATION,
                kv_cache_gib=config.rollout.kv_cache_gib,
                enforce_eager=True,
            )
        )
        with display.status("starting vLLM"):
            await engine.start()
        try:
            agent = SearchAgent(renderer, engine, retrieve, max_length=config.model.max_length)
            greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=0, seed=0, stop=())
            return await agent.run(
                Question("ask", question, ("",)),
                sampling=greedy,
                on_event=lambda event: show(event, on_text),
            )
        finally:
            engine.shutdown()

    return as_json(question, asyncio.run(run()))


def _searched(index: Path | None, config: Config, display: Display) -> Searched:
    retriever = config.retriever
    if index is not None and retriever.url is not None:
        raise UserError(
            f"there are --index {index} and retriever.url ({', '.join(retriever.url)}); leave one out "
            "(retriever.url=null)"
        )
    searched = await_servers(config, display) or index or retriever.index
    if searched is None:
        raise UserError("there is nothing to search: give --index DIR, or retriever.url=ADDRESS of a server")
    return Path(searched) if isinstance(searched, str) else searched


def run_config_of(model: str) -> Path | None:
    """The configuration of the run that a model directory (RUN/iterations/N/model) belongs to, if it does."""
    parents = Path(model).resolve().parents
    config = parents[2] / "config.yaml" if len(parents) > 2 else None
    return config if config is not None and config.is_file() else None


def _quieten_libraries() -> None:
    """Here the engine runs in the process of a person who asks: what vLLM tells operators would bury the answer."""
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def show(event: Event, on_text: Callable[[str], None]) -> None:
    """One event of a trajectory in words."""
    if event.kind == "search":
        for rank, hit in enumerate(event.hits, start=1):
            on_text(f"    [{rank}] {hit.score:.2f}  {hit.passage.title}: {hit.passage.text}")
    elif event.kind == "stop":
        if event.text != "answered":
            on_text(f"stopped: {event.text}")
    else:
        on_text(f"{event.kind:>7}  {event.text}")


def as_json(question: str, trajectory: Trajectory) -> Json:
    """A trajectory for programs."""
    return {
        "question": question,
        "answer": trajectory.answer,
        "stop_reason": trajectory.stop_reason.value,
        "steps": [
            {
                "query": step.query,
                "hits": [
                    {"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score}
                    for h in step.hits
                ],
                "record": step.record,
            }
            for step in trajectory.steps
        ],
    }
