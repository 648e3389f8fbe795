"""What goes over the wire, in three dialects: requests as models that check, replies as plain data.

    native       POST /search      everything that the library can do
    Search-R1    POST /retrieve    the de-facto standard of agent training; with SkyRL's singular `query`
    ExSearch     GET /api/search   of the original program

The last two are contracts of others: their replies hold exactly the fields that they have there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SkipValidation, model_validator

# pydantic reads `typing.TypedDict` from Python 3.12 on only.
from typing_extensions import TypedDict

from retriever_service.choices import Method
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import Hit, SearchOptions
from retriever_service.service.batching import Answers

SEARCH_R1_TOPK = 3
EXSEARCH_K, EXSEARCH_MOST_K = 10, 100
LEAST_DEADLINE_S = 1.0

Scalar = str | int | float | bool | None
Operator = Literal["gt", "gte", "lt", "lte"]
Condition = SkipValidation[
    Scalar
    | list[Scalar]
    | Annotated[dict[Operator, int | float], Field(min_length=1)]
    | Annotated[dict[Operator, str], Field(min_length=1)]
]
"""What `filters` understands of one field. It is `Filter.parse` that checks it, and says what is wrong."""


def _one_of_two(schema: dict[str, Any]) -> None:
    """Tell the schema what `_has_one_of_two` checks."""
    for name in ("query", "queries"):
        schema["properties"][name].pop("default")
    schema["oneOf"] = [{"required": ["query"]}, {"required": ["queries"]}]


class _Questions(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, json_schema_extra=_one_of_two)

    query: str = Field("", description="One query; instead of `queries`.")
    queries: list[str] = Field([], min_length=1, description="Queries, answered in this order.")

    @model_validator(mode="after")
    def _has_one_of_two(self) -> _Questions:
        if ("query" in self.model_fields_set) == ("queries" in self.model_fields_set):
            raise ValueError("give either queries, a list of strings, or query, one string")
        return self

    @property
    def all_queries(self) -> list[str]:
        return [self.query] if "query" in self.model_fields_set else self.queries


class SearchRequest(_Questions):
    """The native request."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(10, ge=1, description="Passages wanted per query.")
    method: Method = Field("dense", description="By vectors, by words, or both by reciprocal-rank fusion.")
    rerank: int = Field(
        0, ge=0, description="So many best candidates are ordered anew by the cross-encoder; 0: none."
    )
    filter: dict[str, Condition] = Field(
        {},
        description="Only passages whose metadata fulfil all conditions: a value, a list of allowed values, or bounds.",
        examples=[{"year": {"gte": 1990, "lt": 2000}, "lang": ["en", "de"], "kind": "city"}],
    )
    exclude: list[str] = Field([], description="Ids of passages that must not come.")
    distinct: bool = Field(
        False, description="Of passages with nearly the same words only the best one comes."
    )
    deadline_s: float | None = Field(
        None,
        ge=LEAST_DEADLINE_S,
        description="The answer is of no use after so many seconds (the server has a limit of its own).",
    )

    @property
    def options(self) -> SearchOptions:
        """As the library understands it.

        Raises:
            RetrieverError: a filter that makes no sense.
        """
        return SearchOptions(
            method=self.method,
            rerank=self.rerank,
            where=Filter.parse(self.filter) if self.filter else None,
            exclude=frozenset(self.exclude),
            distinct=self.distinct,
        )


class RetrieveRequest(_Questions):
    """Search-R1's request. Fields that it does not know are ignored, as there."""

    topk: int | None = Field(None, ge=1, description=f"Passages wanted per query; null: {SEARCH_R1_TOPK}.")
    return_scores: bool = Field(False, description="False: bare documents. True: each beside its score.")


class NewPassage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(min_length=1)
    title: str = ""
    text: str
    metadata: dict[str, JsonValue] = {}


class AddRequest(BaseModel):
    """Passages to add."""

    model_config = ConfigDict(strict=True, extra="forbid")

    passages: list[NewPassage] = Field(min_length=1)

    def to_passages(self) -> list[Passage]:
        return [Passage(new.id, new.title, new.text, new.metadata) for new in self.passages]


class DeleteRequest(BaseModel):
    """Ids of passages to delete."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ids: list[str] = Field(min_length=1)


class HitReply(TypedDict):
    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    score: float
    rank: int
    """From 1."""


class QueryReply(TypedDict):
    hits: list[HitReply]
    returned: int
    """Number of hits; fewer than k where fewer were found."""


class SearchReply(TypedDict):
    results: list[QueryReply]
    """One per query, in order."""
    index: str
    """Fingerprint of the index that all of them come from."""


class Document(TypedDict):
    id: str
    contents: str
    """The title in double quotes on the first line, then the text."""


class ScoredDocument(TypedDict):
    document: Document
    score: float


class RetrieveReply(TypedDict):
    result: list[list[ScoredDocument]] | list[list[Document]]


class ExSearchHit(TypedDict):
    text: str
    """Title and text with ` | ` between them."""
    pid: str
    rank: int
    score: float
    prob: float
    """Softmax over the scores of this reply."""


class ExSearchReply(TypedDict):
    query: str
    topk: list[ExSearchHit]


class UpdateReply(TypedDict):
    passages: int
    """How many the index has now."""
    index: str
    """Its fingerprint now."""


class InfoReply(TypedDict):
    index: str
    """Fingerprint; changes whenever answers may."""
    version: str
    """Of the program."""
    engine: dict[str, Any]
    """What is known of index and encoder."""


class StateReply(TypedDict):
    state: str
    """loading, ready, draining or failed."""


class ErrorReply(TypedDict):
    error: str
    """Kind of failure, one word."""
    detail: str
    """What is wrong, and how to mend it."""


def search_reply(answers: Answers) -> SearchReply:
    return {
        "results": [{"hits": _native_hits(hits), "returned": len(hits)} for hits in answers.hits],
        "index": answers.fingerprint,
    }


def _native_hits(hits: Sequence[Hit]) -> list[HitReply]:
    return [
        {
            "id": hit.passage.id,
            "title": hit.passage.title,
            "text": hit.passage.text,
            "metadata": dict(hit.passage.metadata),
            "score": hit.score,
            "rank": rank,
        }
        for rank, hit in enumerate(hits, start=1)
    ]


def retrieve_reply(answers: Answers, *, return_scores: bool) -> RetrieveReply:
    """Search-R1's clients, verl and SkyRL ask for scores; slime and torchtitan want the bare documents."""
    if return_scores:
        return {"result": [[_scored(hit) for hit in hits] for hits in answers.hits]}
    return {"result": [[_document(hit.passage) for hit in hits] for hits in answers.hits]}


def _scored(hit: Hit) -> ScoredDocument:
    return {"document": _document(hit.passage), "score": hit.score}


def _document(passage: Passage) -> Document:
    # The first line is the title for every client, even where there is none or it has a line break itself.
    title = passage.title.replace("\n", " ")
    return {"id": passage.id, "contents": f'"{title}"\n{passage.text}'}


def exsearch_reply(query: str, hits: Sequence[Hit]) -> ExSearchReply:
    # Scores of re-rankers and word indexes are large enough to overflow without the subtraction.
    weights = [math.exp(hit.score - hits[0].score) for hit in hits]
    total = sum(weights)
    return {
        "query": query,
        "topk": [
            {
                "text": f"{hit.passage.title} | {hit.passage.text}",
                "pid": hit.passage.id,
                "rank": rank,
                "score": hit.score,
                "prob": weight / total,
            }
            for rank, (hit, weight) in enumerate(zip(hits, weights, strict=True), start=1)
        ],
    }
