"""Synthesise cold-start trajectories into a file, with the real retriever and without a language model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from actors.retriever import open_retriever
from pipeline.core.config import Config
from pipeline.core.data.cold_start import write_trajectories
from pipeline.core.data.cold_start_source import ColdStartMaker
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.models import load_tokenizer
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import what_is_searched
from pipeline.core.run import Json
from retriever_service import interrupts


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
    maker = ColdStartMaker(
        config.cold_start, config.data, config.retriever, renderer, config.model.max_length, config.seed
    )
    splits = load_splits(config.data, config.seed, required=("train",), apart=config.cold_start.sources)
    questions = maker.questions(splits.train)
    with tempfile.TemporaryDirectory() as scratch:
        searched = what_is_searched(
            config.retriever,
            config.data,
            Path(scratch) / "index",
            display,
            documents=config.agent.documents,
            timeout_s=config.cluster.start_timeout_s,
        )
        retrieve = open_retriever(searched, config.retriever)
        with display.status("synthesising trajectories"):
            cache = out.with_name(f"{out.name}.rewritten.jsonl")
            result = interrupts.run(maker.synthesise(questions, retrieve, searched, cache))
    write_trajectories(out, result.trajectories, renderer)
    return {"out": str(out)} | result.statistics()
