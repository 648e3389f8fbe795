"""ToolRet (Shi et al. 2025, arXiv 2503.01763): a sentence encoder that retrieves tools for an instruction and a query.

    theta_0 <- any sentence encoder
    for t = 1 .. N, until dev no longer improves:
        D_t     <- for every relevant tool of every training query the tools that theta_{t-1} ranks highest and nobody
                   judged relevant, without those that score above the relevant one
        theta_t <- InfoNCE on D_t from theta_{t-1}, by sentence-transformers' own trainer

The paper mines once, with NV-Embed-v1, which N = 1 is with another encoder. There is no language model here, and no
Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn

import torch
from pydantic import Field
from rich.table import Table

from pipeline.core.agents.program import Answering
from pipeline.core.benchmarks.spec import (
    INSTRUCTION_FORMAT,
    QUERY_FORMAT,
    InstructionFormat,
    QueriesConfig,
    QueryFormat,
)
from pipeline.core.config import Config, OnDisk, Rounds
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.policies import PolicySpec
from pipeline.core.report import Column, Outcome, best_iteration, should_stop
from pipeline.core.retrieval import corpus_paths
from pipeline.core.run import Json
from pipeline.core.tables import narrow_table, number
from pipeline.encoder_run import open_encoder_run
from retriever_service.encoding.encoder import BUNDLED_MODEL

MEASURES = ("ndcg@10", "precision@10", "recall@10", "all_gold@10")
_READ = ("recipe", "seed", "toolret", "data", "tracking")
_READ_OF_DATA = ("root", "corpus")


class Settings(Rounds):
    """Training of a tool retriever (recipe `toolret`). The tools are `data.corpus`, below `data.root`."""

    measures: ClassVar[tuple[str, ...]] = MEASURES

    iterations: int = Field(1, ge=0)
    """Rounds; each mines negatives with the encoder as it is, and trains on them (the paper: 1)."""
    select_by: Literal["ndcg@10", "precision@10", "recall@10", "all_gold@10"] = "ndcg@10"
    """Dev measure that names the best round, of queries with their instructions where they have some."""
    encoder: Annotated[str, OnDisk()] = BUNDLED_MODEL
    """What it starts from: minilm, or any sentence-transformers model."""
    query_prefix: str | None = None
    """In front of queries. Null: the family's."""
    passage_prefix: str | None = None
    """In front of tools. Null: the family's."""
    query_format: QueryFormat = QUERY_FORMAT
    """What is asked without an instruction, behind the prefix."""
    instruction_format: InstructionFormat = INSTRUCTION_FORMAT
    """What is asked with one, behind the prefix."""
    train: QueriesConfig | None = None
    """Training queries with judgements, or ToolRet's rows {query, prompt, pos, neg}, whose texts are then the tools."""
    dev: QueriesConfig | None = None
    """Queries that rounds are compared on. Null: `dev_queries` of the training queries, which are not trained on."""
    dev_queries: int = Field(200, ge=1)
    """So many are held out where there is no `dev`."""
    test: QueriesConfig | None = None
    """Queries that the start and the best round are scored on."""
    instructions: bool = True
    """Train with the instructions of the queries; dev and test have both arms anyway."""
    negatives: int = Field(7, ge=1)
    """Mined negatives of each row (the paper: a group of 8)."""
    candidates: int = Field(100, ge=1)
    """So deep negatives are looked for."""
    margin: float | None = Field(0.0, ge=0)
    """Candidates that score above the relevant tool less this (cosine) are left out, as likely relevant. Null: none."""
    epochs: int = Field(2, ge=1)
    """Passes over the rows of a round."""
    batch_size: int = Field(4, ge=2)
    """Rows of a step, of each process; the tools of the others are negatives as well."""
    mini_batch: int | None = Field(None, ge=1)
    """So many texts at a time go through the model, with cached gradients. Null: all of a step at once."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak; it falls linearly to 0."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which it rises."""
    temperature: float = Field(0.02, gt=0)
    """tau: cosines are divided by it."""
    max_tokens: int | None = Field(None, ge=8)
    """Texts are cut at so many tokens. Null: the model's limit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic of training; weights are float32."""
    processes: int = Field(1, ge=1)
    """Processes that train, each on a GPU of its own."""
    checkpoint_steps: int = Field(200, ge=1)
    """Steps between two checkpoints; a killed run loses these at most."""


_NAMES = {arm: [f"{name}@10{mark}" for name in "NPRC"] for arm, mark in (("without", ""), ("with", " inst"))}
COLUMNS = (
    Column("rows", "mine.rows", 0),
    Column("left out", "mine.left_out", 0),
    Column("loss", "encoder/train.loss", 3),
    *(
        Column(name, f"evaluation.{arm}.{measure}")
        for arm, names in _NAMES.items()
        for name, measure in zip(names, MEASURES, strict=True)
    ),
)
LEGEND = (
    "dev, in percent: nDCG, precision, recall, completeness; inst: with instructions; left out: candidates that score\n"
    "above the relevant tool; * best"
)


def answering(config: Config) -> Answering:
    """
    Raises:
        UserError: always; an encoder answers no question.
    """
    _no_language_model("score it by exsearch benchmark, as encoder of a retriever")


def policies(config: Config) -> list[PolicySpec]:
    """
    Raises:
        UserError: always; there are no engines and no learner ranks to make room for.
    """
    _no_language_model("exsearch plan has nothing to say of it")


def _no_language_model(mend: str) -> NoReturn:
    raise UserError(f"the recipe toolret trains a sentence encoder, which answers no question; {mend}")


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings of sections that the recipe does not read, or without which it cannot train.
    """
    settings: Settings = config.of_recipe
    fields, data = type(config).model_fields, type(config.data)()
    idle = [name for name in fields if name not in _READ and getattr(config, name) != fields[name].default]
    of_data = [
        n
        for n in type(data).model_fields
        if n not in _READ_OF_DATA and getattr(config.data, n) != getattr(data, n)
    ]
    if idle or of_data:
        named = idle[0] if idle else f"data.{of_data[0]}"
        raise UserError(
            f"{named} says nothing to the recipe toolret, whose keys are in the section toolret; remove it"
        )
    if settings.train is None:
        raise UserError("toolret.train is empty; give toolret.train.queries, and toolret.train.qrels")
    if settings.dev is not None and settings.dev_queries != Settings().dev_queries:
        raise UserError("toolret.dev_queries are held out where there is no toolret.dev; remove one of them")
    gpus = torch.cuda.device_count()
    if settings.dtype == "float16" and not gpus:
        raise UserError("toolret.dtype: float16 needs a GPU, and torch finds none; set bfloat16 or float32")
    if gpus and settings.processes > gpus:
        raise UserError(
            f"toolret.processes ({settings.processes}) are more than the GPUs here ({gpus}); set it to {gpus}"
        )
    if not config.data.corpus:
        raise UserError("data.corpus is empty; name the file of tools")
    for path in (config.data.root, *corpus_paths(config.data)):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist; data.corpus starts from data.root ({config.data.root})")


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    with open_encoder_run(config, run_path, display) as run:
        run.evaluate(0)
        for t in range(1, settings.iterations + 1):
            run.mine(t)
            run.train(t)
            run.evaluate(t)
            run.end_iteration(t)
            if should_stop(run.files, t, settings):
                break
        run.test("start", 0)
        run.test("best", best_iteration(run.files, settings))
        report = run.report()
        return Outcome(report, COLUMNS, LEGEND, ("start", report["start"]), tests_table=_tests(report))


def _tests(report: Json) -> Table:
    table = narrow_table(
        "test queries, in percent", "model", [name for names in _NAMES.values() for name in names]
    )
    for name in ("start", "best"):
        of = report["test"].get(name, {})
        cells = [of.get(arm, {}).get(measure) for arm in _NAMES for measure in MEASURES]
        if any(cell is not None for cell in cells):
            table.add_row(name, *map(number, cells))
    return table
