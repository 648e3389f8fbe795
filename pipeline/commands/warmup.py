"""Synthesise warm-up trajectories into a file, with the real retriever and without a language model."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from actors.retriever import open_retriever
from pipeline.core.config import Config
from pipeline.core.data.splits import load_splits
from pipeline.core.data.warmup import write_trajectories
from pipeline.core.data.warmup_source import synthesise_warm_up, warm_up_questions
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.models import load_tokenizer
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import await_servers, prepare_index
from pipeline.core.run import Json


def write_warm_up(config: Config, out: Path, display: Display) -> Json:
    """Write `warmup.questions` trajectories to `out`; returns counts.

    Raises:
        UserError: `warmup.questions` is 0, or bad input.
    """
    if config.warmup.questions == 0:
        raise UserError(
            "warmup.questions is 0: there is nothing to synthesise; give a number, warmup.questions=1000"
        )
    renderer = Renderer(load_tokenizer(config.model.path), config.agent)
    questions = warm_up_questions(config, load_splits(config, required=("train",)).train)
    with tempfile.TemporaryDirectory() as scratch:
        searched = await_servers(config, display) or prepare_index(config, Path(scratch) / "index", display)
        retrieve = open_retriever(searched, config.retriever)
        with display.status("synthesising trajectories"):
            cache = out.with_name(f"{out.name}.rewritten.jsonl")
            result = asyncio.run(synthesise_warm_up(config, questions, renderer, retrieve, searched, cache))
    write_trajectories(out, result.trajectories, renderer)
    return {"out": str(out)} | result.statistics()
