"""The perfect agent of the cold start: a script of turns, and a retriever that never misses the gold passage."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from pipeline.core.agents.program import Completion, Retrieve, Sampling
from pipeline.core.data.supervision import GoldStep
from pipeline.core.records import Question
from pipeline.core.renderer import Renderer
from pipeline.core.turns import Call, Turn
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


class Script:
    """A `Generator` that says the turns of a perfect agent. Its log-probabilities are 0: it was certain."""

    def __init__(self, renderer: Renderer, turns: Iterator[str]) -> None:
        self.renderer = renderer
        self.turns = turns

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        text = next(self.turns)
        ids = turn_ids(self.renderer, text)
        if len(ids) > sampling.max_tokens:
            return Completion(ids[: sampling.max_tokens], [0.0] * sampling.max_tokens, text, None, "length")
        stop = next((s for s in sampling.stop if text.endswith(s)), None)
        # Another turn is due than the one that the agent asks for only where it has run out of room.
        return Completion(ids, [0.0] * len(ids), text, stop, "stop" if stop else "length")


def gold_turns(
    renderer: Renderer, question: Question, steps: Sequence[GoldStep], retriever: GoldRetriever
) -> Iterator[str]:
    """Each is made when it is its turn: by then the passages are found that it selects from."""
    config, answer = renderer.config, question.answers[0]
    if not config.think and not config.search:
        # The environment opens the answer.
        yield f" {answer} {renderer.tags.answer[1]}"
        return
    queries, found = [step.query for step in steps], [step.evidence for step in steps]
    if not config.think:
        # One search with the question itself.
        queries, found = [], [" ".join(dict.fromkeys(found))]
    records = found if config.record else [""] * len(found)
    for record, query in zip(["", *records], queries, strict=False):
        yield renderer.turn_text(Turn(record, query, selected=retriever.take_selection()))
    record = records[-1]
    for action in renderer.actions.values():
        for content in action.demonstrate(question):
            call = Call(action.name, content)
            yield renderer.turn_text(Turn(record, selected=retriever.take_selection(), call=call))
            record = ""
    yield renderer.turn_text(Turn(record, answer=answer, selected=retriever.take_selection()))


def turn_ids(renderer: Renderer, text: str) -> list[int]:
    """Ids of a turn. Only the protocol's own tags may become special tokens, never what evidence quotes."""
    tokenizer = renderer.tokenizer
    special = [string for string in renderer.written if string in tokenizer.all_special_tokens]
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=piece not in special)[
            "input_ids"
        ]
    return ids


class GoldRetriever:
    """The real retriever, with the gold passage of each search put among the hits if it was missed.

    Args:
        selects: passages that a perfect agent selects of each search.
    """

    def __init__(
        self, retrieve: Retrieve, steps: Sequence[GoldStep], rng: random.Random, selects: int
    ) -> None:
        self.retrieve = retrieve
        self.passages_of: dict[str, list[Passage]] = {}
        self.all_passages = [step.passage for step in steps]
        for step in steps:
            self.passages_of.setdefault(step.query.strip(), []).append(step.passage)
        self.rng = rng
        self.selects = selects
        self._selection: tuple[int, ...] = ()
        self.searches = 0
        self.inserted = 0

    async def __call__(self, query: str, k: int) -> list[Hit]:
        hits = list(await self.retrieve(query, k))
        # The question itself stands for all steps where the agent does not think.
        wanted = list(dict.fromkeys(self.passages_of.get(query, self.all_passages)))[:k]
        self.searches += 1
        wanted_ids = {passage.id for passage in wanted}
        for passage in wanted:
            if all(hit.passage.id != passage.id for hit in hits):
                hits = self._with(hits, passage, k, wanted_ids)
                self.inserted += 1
        ids = [hit.passage.id for hit in hits]
        gold = [ids.index(passage.id) for passage in wanted]
        order = [*gold, *(place for place in range(len(hits)) if place not in gold)]
        self._selection = tuple(order[: self.selects])
        return hits

    def take_selection(self) -> tuple[int, ...]:
        """Places among the hits of the last search, the gold ones first; none once they were taken."""
        selection, self._selection = self._selection, ()
        return selection

    def _with(self, hits: list[Hit], passage: Passage, k: int, keep: set[str]) -> list[Hit]:
        """`hits` with the passage at a random rank, in place of the last one that is not gold itself."""
        hits = list(hits)
        if len(hits) >= k:
            del hits[max(rank for rank, hit in enumerate(hits) if hit.passage.id not in keep)]
        rank = self.rng.randint(0, len(hits))
        neighbour = hits[min(rank, len(hits) - 1)].score if hits else 0.0
        return [*hits[:rank], Hit(passage, neighbour), *hits[rank:]]
