"""What a benchmark keeps of a task, a retriever and an arm: the rankings, as Parquet, with what they depend on.

    OUT/rankings/RETRIEVER/TASK.ARM.parquet      a row per query: query_id, passages, scores

A file is whole or absent. It is used again as long as nothing that its rankings follow from has changed; measures are
made of it anew each time, so others may be asked for without a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.benchmarks.corpora import digest_json, model_identity
from pipeline.core.benchmarks.queries import Query
from pipeline.core.benchmarks.searching import Ranking
from pipeline.core.benchmarks.spec import Arm, SearchConfig, split_measure
from pipeline.core.errors import UserError
from pipeline.core.run import write_table
from retriever_service.passages.evaluation import score_questions

_SCHEMA = pa.schema(
    [("query_id", pa.string()), ("passages", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
)
_MADE_OF = b"exsearch.made_of"
_VERSION = 1
_QUESTION, _PASSAGE = "q", "p"


@dataclass(frozen=True, slots=True)
class Cell:
    """One task under one retriever in one arm."""

    retriever: str
    task: str
    arm: Arm

    def path(self, out: Path) -> Path:
        return out / "rankings" / self.retriever / f"{self.task}.{self.arm}.parquet"


def models_of(config: SearchConfig, device: str) -> list[str]:
    """What the models of a retriever are, and what they compute on; reads all files of those in folders."""
    models = [model_identity(name) for name in (config.encoder_name, config.rerank) if name is not None]
    return [*models, device] if models else []


def made_of(
    config: SearchConfig,
    models: Sequence[str],
    arm: Arm,
    queries: Sequence[Query],
    corpus: str,
    depth: int,
    *,
    exclude_same_id: bool,
) -> str:
    """Identity of everything that the rankings of a cell follow from.

    Args:
        models: see `models_of`.
        corpus: digest of its contents.
    """
    settings = config.model_dump(mode="json") | {
        "models": models,
        "encoder": None,
        "rerank": config.rerank is not None,
    }
    # Judgements are not among them: rankings do not know them.
    return digest_json(
        [
            _VERSION,
            settings,
            arm,
            [[q.id, q.text, q.instruction] for q in queries],
            corpus,
            depth,
            exclude_same_id,
        ]
    )


def is_finished(path: Path, identity: str) -> bool | None:
    """Whether a cell holds the rankings of this identity; None if it holds others.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return False
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error!s:.200}); remove it: the same command makes it again"
        ) from error
    return True if metadata.get(_MADE_OF) == identity.encode() else None


def write_rankings(path: Path, identity: str, queries: Sequence[Query], rankings: Sequence[Ranking]) -> None:
    """Write a finished cell, whole or not at all."""
    columns = {
        "query_id": [query.id for query in queries],
        "passages": [[id_ for id_, _ in ranking] for ranking in rankings],
        "scores": [[score for _, score in ranking] for ranking in rankings],
    }
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_MADE_OF: identity})
    write_table(path, table, "zstd")


def read_rankings(path: Path) -> dict[str, Ranking]:
    """Rankings by query id.

    Raises:
        UserError: the file is damaged.
    """
    try:
        rows = pq.read_table(path).to_pylist()
        return {row["query_id"]: list(zip(row["passages"], row["scores"], strict=True)) for row in rows}
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error!s:.200}); remove it: the same command makes it again"
        ) from error


def measure(
    queries: Sequence[Query], rankings: dict[str, Ranking], measures: Sequence[str]
) -> dict[str, list[float]]:
    """By measure ("ndcg@10") its value for each query, in [0, 1], in the order of the queries.

    Queries and passages may have the same ids; they are told apart here.
    """
    qrels = {
        f"{_QUESTION}{query.id}": {f"{_PASSAGE}{id_}": grade for id_, grade in query.gold.items()}
        for query in queries
    }
    run = {f"{_QUESTION}{id_}": [(f"{_PASSAGE}{p}", s) for p, s in found] for id_, found in rankings.items()}
    names = {name: split_measure(name) for name in measures}
    scored = score_questions(
        qrels, run, sorted({kind for kind, _ in names.values()}), sorted({k for _, k in names.values()})
    )
    return {name: [scored[f"{_QUESTION}{query.id}"][name] for query in queries] for name in measures}
