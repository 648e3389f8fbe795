"""What an estimate need not take for granted, because it can be looked at: the run's questions and passages."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence

from pipeline.core.config import Config
from pipeline.core.data.check import passages_of
from pipeline.core.data.questions import read_questions
from pipeline.core.data.split_names import Split
from pipeline.core.errors import UserError
from pipeline.core.models import read_tokenizer
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.records import Question
from pipeline.core.renderer import Renderer
from retriever_service.errors import RetrieverError
from retriever_service.passages.hits import Hit

logger = logging.getLogger(__name__)

SAMPLE = 200
"""Questions and passages whose tokens are counted."""
QUESTIONS_OF: dict[Split, str] = {"train": "questions", "dev": "dev_questions", "test": "test_questions"}
"""The assumption of each split."""


def observe(config: Config, assumptions: Assumptions) -> Assumptions:
    """Assumptions that were left open, as the data says. What cannot be read stays open, and it is logged which."""
    found: dict[str, float] = {}
    for split, key in QUESTIONS_OF.items():
        if split != "train" and getattr(assumptions, key) is not None:
            continue
        questions = _questions(config, split)
        if isinstance(questions, int):
            found[key] = questions
        elif questions is not None:
            found[key] = len(questions)
            if split == "train" and questions:
                found |= _trajectories(config, questions[:SAMPLE])
    return fill(assumptions, found)


def fill(assumptions: Assumptions, found: dict[str, float]) -> Assumptions:
    """The same, with what was found in place of nulls."""
    return assumptions.model_copy(
        update={key: value for key, value in found.items() if getattr(assumptions, key) is None}
    )


def _questions(config: Config, split: Split) -> list[Question] | int | None:
    """Of a split; where its files cannot be read here its limit, or None."""
    paths = getattr(config.data, split)
    if not paths:
        return 0 if split == "test" else None
    limit: int | None = getattr(config.data, f"{split}_limit")
    try:
        return read_questions(
            paths,
            root=config.data.root,
            limit=limit,
            seed=config.data.sample_seed(config.seed),
            hops=config.data.hops_of(split),
        )
    except UserError as error:
        logger.warning(f"data.{split} is not read, and a number of questions assumed: {error}")
        return limit


def _trajectories(config: Config, questions: Sequence[Question]) -> dict[str, float]:
    """What decides how long a trajectory of such questions is: a search for each gold passage, as many tokens as these
    questions and the first passages have."""
    found: dict[str, float] = {}
    if gold := [len(question.supporting_ids) for question in questions if question.supporting_ids]:
        found["searches"] = min(statistics.mean(gold), config.agent.max_searches)
    try:
        tokenizer = read_tokenizer(config.model.path)
        renderer = Renderer(tokenizer, config.agent)
        found["prompt_tokens"] = statistics.mean(len(renderer.prompt_ids(q.text)) for q in questions)
        found["turn_tokens"] = statistics.mean(
            len(tokenizer.encode(q.text, add_special_tokens=False)) for q in questions
        )
        passages = passages_of(config.data, config.retriever) if config.agent.search else None
        if passages and (hits := [Hit(p, 0.0) for p in itertools.islice(passages(), SAMPLE)]):
            found["passage_tokens"] = len(renderer.observation_ids(hits)) / len(hits)
    except (UserError, RetrieverError) as error:
        logger.warning(f"tokens of questions and passages are assumed: {error}")
    return found
