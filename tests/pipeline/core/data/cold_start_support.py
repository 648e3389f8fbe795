"""Four passages, a question with all that is known of its steps, and a retriever by word overlap."""

from __future__ import annotations

import asyncio
from typing import Any

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import ColdStartResult, synthesise
from pipeline.core.records import Hop, Question
from pipeline.core.renderer import Renderer
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

CORPUS = {
    "harp": Passage(
        "harp", "Silver Harp", "The Silver Harp is a toy. It is made by Orvane. It was sold in 1990."
    ),
    "orvane": Passage(
        "orvane", "Orvane", "Orvane is a company in Tal. It was founded by Mara Velin in 1984."
    ),
    "tal": Passage("tal", "Tal", "Tal is a city by the sea. Orvane and Brask are there."),
    "brask": Passage("brask", "Brask", "Brask is a company. Its founder was J. Oll."),
}
HOPS = (
    Hop("Which company makes the Silver Harp?", "Orvane", "The Silver Harp is made by Orvane.", "harp"),
    Hop("Who founded Orvane?", "Mara Velin", "Orvane was founded by Mara Velin.", "orvane"),
)
QUESTION = Question(
    id="q1",
    text="Who founded the maker of the Silver Harp?",
    answers=("Mara Velin", "M. Velin"),
    supporting_ids=("harp", "orvane"),
    decomposition=HOPS,
)


async def by_overlap(query: str, k: int) -> list[Hit]:
    words = set(query.lower().strip("?").split())
    scored = [Hit(p, float(len(words & set(p.text.lower().split())))) for p in CORPUS.values()]
    return sorted(scored, key=lambda hit: -hit.score)[:k]


def synthesised(
    tokenizer: Any,
    *questions: Question,
    retrieve: Any = by_overlap,
    seed: int = 0,
    max_length: int = 4096,
    rewriter: Any = None,
    **config: Any,
) -> tuple[ColdStartResult, Renderer]:
    renderer = Renderer(tokenizer, AgentConfig(**{"documents": 2, **config}))
    run = synthesise(
        questions,
        renderer,
        retrieve,
        CORPUS.get,
        max_length=max_length,
        seed=seed,
        rewriter=rewriter,
    )
    return asyncio.run(run), renderer
