"""A benchmark as its file says it: corpora, tasks, retrievers, arms. docs/methods/mair.md describes the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from pipeline.core.config.loading import apply_override, describe, read_tree
from pipeline.core.config.section import Section, Sources, from_home
from pipeline.core.errors import UserError, suggestion
from retriever_service.choices import Method, WeightsDtype
from retriever_service.encoding.encoder import BUNDLED_MODEL
from retriever_service.passages.evaluation import MEASURES, Measure

Arm = Literal["without", "with"]
ARMS: tuple[Arm, ...] = get_args(Arm)
CONSTRAINTS = "constraints"
"""Corpus and domain of the generated tasks."""
QUERY_FORMAT = "{query}"
INSTRUCTION_FORMAT = "Instruct: {instruction}\nQuery: {query}"
"""What encoders and re-rankers are given (Wang et al. 2024, E5-mistral; ToolRet's and MAIR's default)."""
WORDS_FORMAT = "{instruction} {query}"
"""What BM25 is given."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


def split_measure(name: str) -> tuple[Measure, int]:
    """The measure and the k of "ndcg@10".

    Raises:
        ValueError: it is of another form, or there is no such measure.
    """
    measure, _, k = name.partition("@")
    if measure not in MEASURES or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"should be a measure and a depth, such as ndcg@10; measures: {', '.join(MEASURES)}")
    return measure, int(k)


def _is_measure(name: str) -> str:
    split_measure(name)
    return name


def _is_format(*fields: str) -> AfterValidator:
    def check(text: str) -> str:
        found = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        if missing := [field for field in fields if field not in found]:
            raise ValueError(f"should have the field {{{missing[0]}}}")
        if others := [name for name in found if name not in fields]:
            raise ValueError(f"should have no field {{{others[0]}}}; a brace by itself is written twice")
        return text

    return AfterValidator(check)


QueryFormat = Annotated[str, _is_format("query")]
InstructionFormat = Annotated[str, _is_format("instruction", "query")]


class QueriesConfig(Section):
    """Queries with their judgements."""

    queries: Annotated[str, AfterValidator(from_home)]
    """File of records: {_id, text} (BEIR), {id, question}, {qid, query, instruction, labels} (MAIR), {id, query,
    instruction, labels} (ToolRet)."""
    qrels: Annotated[str | None, AfterValidator(from_home)] = None
    """Judgements, BEIR's TSV or TREC's. Null: each query has `labels`, a list or as JSON text, or `supporting_ids`."""
    instruction: str | None = None
    """Of every query that has none of its own."""
    limit: int | None = Field(None, ge=1)
    """So many queries, drawn with the seed. Null: all that are judged."""


class TaskConfig(QueriesConfig):
    """One retrieval task."""

    domain: str
    """Tasks of a domain are averaged; ToolRet's category."""
    corpus: str
    """A key of `corpora`. Tasks may share one."""
    exclude_same_id: bool = False
    """A passage with the query's own id is left out, as BEIR does for ArguAna and Quora."""


class ConstraintsConfig(Section):
    """Eight generated tasks whose queries ask for a form of the answer that a program can check."""

    seed: int = Field(0, ge=0)
    """Of the world and of the responses."""
    questions: int = Field(50, ge=1, le=500)
    """Questions; each has one query in every task."""
    responses: int = Field(16, ge=4)
    """Responses to each question; all of them are the corpus of all eight tasks."""


class SearchConfig(Section):
    """One retriever: a first stage, and a re-ranker behind it."""

    method: Method = "dense"
    """`dense`, `bm25` or `hybrid` (both, by reciprocal-rank fusion)."""
    encoder: Annotated[str | None, AfterValidator(from_home)] = None
    """Of dense and hybrid: minilm, or any sentence-transformers model. Null: minilm."""
    query_prefix: str | None = None
    """In front of queries in both arms. Null: the family's."""
    passage_prefix: str | None = None
    """In front of passages. Null: the family's."""
    max_tokens: int | None = Field(None, ge=1)
    """Texts are cut at so many tokens. Null: the model's limit."""
    dtype: WeightsDtype | None = None
    """Of the encoder's weights. Null: bfloat16 where the device computes in it, else float32."""
    rerank: Annotated[str | None, AfterValidator(from_home)] = None
    """Cross-encoder that orders the best `candidates` anew."""
    candidates: int = Field(100, ge=1)
    """So many are ordered anew, and are all that is ranked."""
    query_format: QueryFormat = QUERY_FORMAT
    """What is asked without an instruction."""
    instruction_format: InstructionFormat | None = None
    """What is asked with one. Null: "Instruct: ...", "Query: ..." in two lines; of BM25 both with a space between."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        of_encoder = ("encoder", "query_prefix", "passage_prefix", "max_tokens", "dtype")
        if self.method == "bm25" and (given := [key for key in of_encoder if getattr(self, key) is not None]):
            raise ValueError(f"{given[0]} belongs to method: dense or hybrid, not bm25; remove it")
        if self.rerank is None and "candidates" in self.model_fields_set:
            raise ValueError("candidates belongs to rerank; name a cross-encoder there, or remove it")
        return self

    @property
    def encoder_name(self) -> str | None:
        """None where nothing is encoded."""
        return None if self.method == "bm25" else self.encoder or BUNDLED_MODEL


class Benchmark(Section):
    """The keys of a benchmark's file."""

    title: str
    """Heading of the table."""
    root: Annotated[str, AfterValidator(from_home)] = "."
    """Folder that relative paths of corpora, queries and qrels start from."""
    corpora: dict[str, Sources] = Field(default_factory=dict)
    """Name -> one file of passages or several; read and encoded once for all tasks."""
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Name -> queries, judgements, corpus."""
    constraints: ConstraintsConfig | None = None
    """Generated tasks beside them. Null: none."""
    retrievers: Annotated[dict[str, SearchConfig], Field(min_length=1)]
    """Name -> who searches."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ARMS
    """`without` and `with` the instruction; where there are both they are compared query by query."""
    measures: Annotated[tuple[Annotated[str, AfterValidator(_is_measure)], ...], Field(min_length=1)] = (
        "ndcg@10",
    )
    """ndcg, precision, recall, mrr, all_gold (completeness), each at a depth. The first one is compared."""
    depth: int = Field(100, ge=1)
    """So many passages are kept of each ranking."""
    bootstrap_samples: int = Field(1000, ge=1)
    """Resamples of the queries for the 95 % intervals."""
    seed: int = Field(0, ge=0)
    """Of `limit` and of the resamples."""
    device: str = "cpu"
    """Torch device of encoders and re-rankers."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.tasks and self.constraints is None:
            raise ValueError("there are no tasks; name some under tasks, or give constraints")
        for kind in ("corpora", "tasks", "retrievers"):
            for name in getattr(self, kind):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{kind}: {name!r} names a file; use letters, digits and . _ + -")
        if self.constraints is not None and CONSTRAINTS in self.corpora:
            raise ValueError(f"corpora: {CONSTRAINTS} is the generated one; give yours another name")
        for name, task in self.tasks.items():
            if task.corpus not in self.corpora:
                raise ValueError(
                    f"tasks.{name}.corpus: there is no corpus {task.corpus}{suggestion(task.corpus, self.corpora)}"
                )
        used = {task.corpus for task in self.tasks.values()}
        if idle := [name for name in self.corpora if name not in used]:
            raise ValueError(f"corpora: no task searches {idle[0]}; remove it")
        if len(set(self.arms)) < len(self.arms) or len(set(self.measures)) < len(self.measures):
            raise ValueError("arms and measures name each one once")
        for name in self.measures:
            if (k := split_measure(name)[1]) > self.depth:
                raise ValueError(
                    f"measures: {name} looks deeper than depth ({self.depth}); set depth to {k} at least"
                )
        return self

    def path(self, name: str) -> Path:
        """A path of the file, with `root` in front where it is relative."""
        return Path(self.root) / name


def read_benchmark(path: Path, overrides: Sequence[str] = ()) -> Benchmark:
    """Read a benchmark's file.

    Args:
        overrides: `key.key=value`, the value in YAML notation; later ones win.

    Raises:
        UserError: no such file, an unknown key (with a suggestion), a value of a wrong type, or settings that do not
            fit.
    """
    if not path.is_file():
        raise UserError(f"there is no benchmark file {path}")
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    _check_keys(tree, path)
    try:
        return Benchmark.model_validate(tree)
    except ValidationError as error:
        problems = (describe(problem).removeprefix("configuration key ") for problem in error.errors())
        raise UserError(f"{path}: {'; '.join(problems)}") from error


def _check_keys(tree: Mapping[str, Any], path: Path) -> None:
    parts: list[tuple[str, Any, type[BaseModel]]] = [("", tree, Benchmark)]
    parts.append((f"{CONSTRAINTS}.", tree.get(CONSTRAINTS), ConstraintsConfig))
    for kind, model in (("tasks", TaskConfig), ("retrievers", SearchConfig)):
        named = tree.get(kind)
        parts += (
            [(f"{kind}.{name}.", part, model) for name, part in named.items()]
            if isinstance(named, dict)
            else []
        )
    for prefix, part, section in parts:
        for key in part if isinstance(part, dict) else ():
            if key not in section.model_fields:
                raise UserError(
                    f"{path}: unknown key {prefix}{key}{suggestion(str(key), section.model_fields)}"
                )
