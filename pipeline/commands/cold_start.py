"""Synthesise cold-start trajectories into a file, with the real retriever and without a language model."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from actors.retriever import open_retriever
from pipeline.core.config import Config
from pipeline.core.data.cold_start import write_trajectories
from pipeline.core.data.cold_start_source import cold_start_questions, synthesise_cold_start
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.models import load_tokenizer
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import what_is_searched
from pipeline.core.run import Json


def write_cold_start(config: Config, out: Path, display: Display) -> Json:
    """Write `cold_start.questions` trajectories to `out`; returns counts.

    Raises:
        UserError: `cold_start.questions` is 0, or bad input.
    """
    if config.cold_start.questions == 0:
        raise UserError(
            "cold_start.questions is 0: there is nothing to synthesise; give a number, cold_start.questions=1000"
        )
    renderer = Renderer(load_tokenizer(config.model.path), config.agent)
    questions = cold_start_questions(
        config,
        load_splits(config.data, config.seed, required=("train",), apart=config.cold_start.sources).train,
    )
    with tempfile.TemporaryDirectory() as scratch:
        searched = what_is_searched(config, Path(scratch) / "index", display)
        retrieve = open_retriever(searched, config.retriever)
        with display.status("synthesising trajectories"):
            cache = out.with_name(f"{out.name}.rewritten.jsonl")
            result = asyncio.run(
                synthesise_cold_start(config, questions, renderer, retrieve, searched, cache)
            )
    write_trajectories(out, result.trajectories, renderer)
    return {"out": str(out)} | result.statistics()
