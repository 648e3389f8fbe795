"""The run of a recipe that trains a sentence encoder: mine, train, evaluate, each a step that is done once.

No Ray, no engines: sentence-transformers' trainer is what trains. Version t is `iterations/000t/encoder/model`,
version 0 what the run starts from. What `encoded/` holds, passages and vectors of single versions, is made again where
it is missing, and removed when the run has its report.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.agents.program import derive_seed
from pipeline.core.benchmarks.cells import measure
from pipeline.core.benchmarks.corpora import BenchmarkCorpus, Encoders, digest_json
from pipeline.core.benchmarks.queries import TaskQueries, holds_pairs, read_pairs, read_task
from pipeline.core.benchmarks.searching import Ranking, TaskSearcher, asked
from pipeline.core.benchmarks.spec import Arm, QueriesConfig, SearchConfig, split_measure
from pipeline.core.benchmarks.summary import summarise
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.encoders.mining import Mined, mine
from pipeline.core.encoders.training import EncoderPhase, train_encoder
from pipeline.core.errors import UserError
from pipeline.core.report import step_report
from pipeline.core.retrieval import corpus_paths
from pipeline.core.run import Json, RunDirectory, write_json, write_table
from pipeline.core.tracking import Tracker
from pipeline.steps import Steps
from retriever_service.encoding.encoder import (
    BUNDLED_MODEL,
    Encoder,
    EncoderSpec,
    bundled_model,
    lasting_name,
)
from retriever_service.passages.corpus import Passage, passage_text

ENCODER = "encoder"
"""The name of the policy."""
_SAMPLES = 1000
"""Of the bootstraps."""


@dataclass(frozen=True, slots=True)
class EncoderData:
    """Queries of the splits. asked_elsewhere: training queries that are left out, for dev or test asks the same.
    tools: the passages of ToolRet's training rows, where those are trained on."""

    train: TaskQueries
    dev: TaskQueries
    test: TaskQueries | None
    asked_elsewhere: int
    tools: tuple[Passage, ...] | None


def read_data(config: Config) -> EncoderData:
    """
    Raises:
        UserError, RetrieverError: a file that is missing or wrong, or too few training queries.
    """
    settings, root = config.of_recipe, Path(config.data.root)

    def split(of: QueriesConfig) -> TaskQueries:
        return read_task(of, root, config.seed)

    tools = None
    if holds_pairs(root / settings.train.queries):
        train, passages = read_pairs(root / settings.train.queries, settings.train.limit, config.seed)
        tools = tuple(passages)
        if settings.dev is None:
            raise UserError(
                f"{settings.train.queries} holds training rows, whose tools have no ids in data.corpus: no dev queries "
                "can be held out of them; give toolret.dev"
            )
    else:
        train = split(settings.train)
    test = None if settings.test is None else split(settings.test)
    if settings.dev is None:
        train, dev = _held_out(train, settings.dev_queries, derive_seed(config.seed, "dev"))
    else:
        dev = split(settings.dev)
    asked_later = {query.text for of in (dev, test) if of is not None for query in of.queries}
    kept = tuple(query for query in train.queries if query.text not in asked_later)
    if not kept:
        raise UserError(
            "no training query is left: dev or test asks all of them; see toolret.dev_queries and toolret.dev"
        )
    left_out = len(train.queries) - len(kept)
    return EncoderData(replace(train, queries=kept), dev, test, left_out, tools)


def _held_out(train: TaskQueries, number: int, seed: int) -> tuple[TaskQueries, TaskQueries]:
    """Training and dev queries."""
    rows = np.random.default_rng(seed).permutation(len(train.queries))
    dev = set(rows[:number].tolist())
    both = [[q for n, q in enumerate(train.queries) if (n in dev) == is_dev] for is_dev in (False, True)]
    return replace(train, queries=tuple(both[0])), TaskQueries(tuple(both[1]))


class EncoderRun(Steps):
    """One run, opened by `open_encoder_run`."""

    def __init__(
        self, config: Config, data: EncoderData, files: RunDirectory, tracker: Tracker, display: Display
    ) -> None:
        super().__init__(files, tracker, display, config.tracking)
        self._config, self._settings, self._data = config, config.of_recipe, data
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._load = Encoders(Encoder.load)
        self._work = files.path / "encoded"

    # ---------------------------------------------------------------- steps

    def mine(self, t: int) -> Json:
        """Step "t/mine": the training rows of a round, with negatives of the encoder of the round before."""
        return self.once(f"{t}/mine", lambda: self._mine(t))

    def train(self, t: int) -> Json:
        """Step "t/encoder/train": version t, from version t - 1 on the rows of t."""
        return self.once(f"{t}/{ENCODER}/train", lambda: self._train(t))

    def evaluate(self, t: int) -> Json:
        """Step "t/evaluation": scores of version t on dev, in both arms."""
        return self.once(f"{t}/evaluation", lambda: self._scores("dev", self._data.dev, t))

    def test(self, name: str, t: int) -> Json:
        """Step "test/NAME": the same on test; done again if another version is to be looked at."""
        asked_ = self._data.test
        if asked_ is None:
            return {}
        step = f"test/{name}"
        if (self.files.finished(step) or {}).get("iteration") != t:
            self.files.forget(step)
        return self.once(step, lambda: {"iteration": t} | self._scores("test", asked_, t))

    def end_iteration(self, t: int) -> None:
        """Mark round t as whole, and remove the trainer's checkpoints."""
        self.files.close_iteration(t)
        shutil.rmtree(self._trainer_of(t), ignore_errors=True)
        self._write_timeline(t)

    def report(self) -> Json:
        """`report.json`: that of every recipe, with how many queries there were in place of what was found in data."""
        config, splits = self._config, self._data
        asked_ = {"train": splits.train, "dev": splits.dev, "test": splits.test}
        counted = {name: _counts(of) for name, of in asked_.items() if of is not None}
        report = step_report(self.files, config.recipe, config.seed, self._settings, _SAMPLES)
        report["data"] = counted | {"asked_elsewhere": splits.asked_elsewhere}
        write_json(self.files.path / "report.json", report)
        shutil.rmtree(self._work, ignore_errors=True)
        return report

    # ---------------------------------------------------------------- what they do

    @cached_property
    def _tools(self) -> BenchmarkCorpus:
        """What dev and test queries are searched in."""
        return BenchmarkCorpus.of_files(
            "tools", [Path(p) for p in corpus_paths(self._config.data)], self._work
        )

    @cached_property
    def _training_tools(self) -> BenchmarkCorpus:
        given = self._data.tools
        return (
            self._tools if given is None else BenchmarkCorpus.of_passages("training-tools", given, self._work)
        )

    def _model_of(self, t: int) -> Path:
        return self.files.at(f"{t}/{ENCODER}/model")

    @cached_property
    def _start(self) -> EncoderSpec:
        """What the run starts from, with all that its name says: versions in other folders are used alike."""
        given = self._settings
        spec = EncoderSpec(
            lasting_name(given.encoder),
            given.query_prefix,
            given.passage_prefix,
            max_length=given.max_tokens,
            dtype="float32",
        )
        return self._load(spec, self._device).spec

    def check_input(self) -> None:
        """Refuse to go on with other tools and queries than those that the results are of.

        Raises:
            UserError: these are others.
        """
        data = self._data
        queries = [asdict(of) for of in (data.train, data.dev, data.test) if of is not None]
        tools = {self._tools.digest, self._training_tools.digest}
        self.files.keep_to(digest_json([queries, sorted(tools)])[:16], "input")

    def _searcher(self, corpus: BenchmarkCorpus, t: int, depth: int) -> TaskSearcher:
        start = self._start
        search = SearchConfig(
            encoder=start.model if t == 0 else str(self._model_of(t)),
            query_prefix=start.query_prefix,
            passage_prefix=start.passage_prefix,
            max_tokens=start.max_length,
            dtype="float32",
            query_format=self._settings.query_format,
            instruction_format=self._settings.instruction_format,
        )
        with self.display.progress(f"version {t}: tools", None, "encoded") as advance:
            return TaskSearcher(
                search,
                corpus,
                depth=depth,
                load=self._load,
                device=self._device,
                on_progress=advance.to,
            )

    def _rank(self, searcher: TaskSearcher, of: TaskQueries, arm: Arm, what: str) -> list[Ranking]:
        with self.display.progress(what, len(of.queries), "queries") as advance:
            return searcher.rank(of.queries, arm, advance)

    def _mine(self, t: int) -> Json:
        settings, of = self._settings, self._data.train
        arm: Arm = "with" if settings.instructions else "without"
        searcher = self._searcher(self._training_tools, t - 1, settings.candidates)
        rankings = self._rank(searcher, of, arm, f"round {t}: mining negatives")
        texts = {passage.id: passage_text(passage) for passage in self._training_tools.passages()}
        mined = mine(
            of.queries,
            rankings,
            texts,
            negatives=settings.negatives,
            margin=settings.margin,
            seed=derive_seed(self._config.seed, "mine", t),
        )
        if len(mined.pairs) < 2:
            raise UserError(
                f"there are {len(mined.pairs)} rows to train on: {mined.not_there} relevant tools of toolret.train are "
                f"not in data.corpus, and for {mined.too_few} there are too few others; lower toolret.negatives, set "
                "toolret.margin=null, or look whether queries and tools belong together"
            )
        write_table(self._rows_of(t), self._table(mined, texts, arm), "zstd")
        return {
            "queries": len(of.queries),
            "rows": len(mined.pairs),
            "left_out": mined.left_out,
            "filled": mined.filled,
            "not_there": mined.not_there,
            "too_few": mined.too_few,
        }

    def _rows_of(self, t: int) -> Path:
        return self.files.at(f"{t}/{ENCODER}/rows.parquet")

    def _trainer_of(self, t: int) -> Path:
        return self.files.at(f"{t}/{ENCODER}/trainer")

    def _table(self, mined: Mined, texts: dict[str, str], arm: Arm) -> pa.Table:
        """Texts as the encoder is to see them: columns anchor, positive, negative_1, ..."""
        before_query, before_tool = self._start.query_prefix or "", self._start.passage_prefix or ""
        formats = self._settings.query_format, self._settings.instruction_format
        columns: dict[str, list[str]] = {
            "anchor": [before_query + asked(pair.query, arm, *formats) for pair in mined.pairs],
            "positive": [before_tool + texts[pair.positive] for pair in mined.pairs],
        }
        for place in range(self._settings.negatives):
            columns[f"negative_{place + 1}"] = [before_tool + texts[p.negatives[place]] for p in mined.pairs]
        return pa.table(columns)

    def _train(self, t: int) -> Json:
        settings, start = self._settings, self._start
        before = bundled_model() if start.model == BUNDLED_MODEL else start.model
        assert start.max_length is not None  # an encoder that is loaded knows
        phase = EncoderPhase(
            model=before if t == 1 else str(self._model_of(t - 1)),
            rows=str(self._rows_of(t)),
            out=str(self._model_of(t)),
            work=str(self._trainer_of(t)),
            query_prefix=start.query_prefix or "",
            passage_prefix=start.passage_prefix or "",
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            mini_batch=settings.mini_batch,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            temperature=settings.temperature,
            max_length=start.max_length,
            dtype=settings.dtype,
            checkpoint_steps=settings.checkpoint_steps,
            processes=settings.processes,
            seed=derive_seed(self._config.seed, "train", t) % 2**31,
        )
        with self.display.progress(f"round {t}: training", None, "steps") as advance:
            return dict(train_encoder(phase, advance.to))

    def _scores(self, split: str, of: TaskQueries, t: int) -> Json:
        """By arm the measures in percent, and the difference; `scores` of the arm that versions are compared in."""
        measures: tuple[str, ...] = self._settings.measures
        searcher = self._searcher(self._tools, t, max(split_measure(name)[1] for name in measures))
        arms: list[Arm] = ["without", "with"] if of.has_instructions else ["without"]
        values = {}
        for arm in arms:
            rankings = self._rank(searcher, of, arm, f"version {t}: {split}, {arm} instructions")
            by_id = {query.id: ranking for query, ranking in zip(of.queries, rankings, strict=True)}
            values[arm] = measure(of.queries, by_id, measures)
        figures: dict[str, Any] = summarise(
            {split: values}, {split: split}, measures, _SAMPLES, self._config.seed
        )
        found: Json = figures["tasks"][split]
        compared = "with" if self._settings.instructions and of.has_instructions else "without"
        scores = found[compared] | {
            "n": len(of.queries),
            f"{measures[0]}_interval": found[compared]["interval"],
        }
        return {"scores": scores, **found}


def _counts(of: TaskQueries) -> Json:
    return {
        "queries": len(of.queries),
        "without_instruction": sum(not query.instruction for query in of.queries),
        "unjudged": of.unjudged,
        "unknown": of.unknown,
        "not_drawn": of.not_drawn,
    }


@contextmanager
def open_encoder_run(config: Config, path: Path, display: Display) -> Iterator[EncoderRun]:
    """Everything is read and checked; nothing is loaded yet.

    Raises:
        UserError, RetrieverError: bad input, or a directory that holds something else.
    """
    data = read_data(config)
    with (
        RunDirectory(path, config) as files,
        Tracker(files.path, config.tracking, files.path.name) as tracker,
        display.follow(files.path),
        EncoderRun(config, data, files, tracker, display) as run,
    ):
        if (how_far := files.how_far(config.of_recipe.iterations)) is not None:
            display.line(how_far)
        run.check_input()
        yield run
