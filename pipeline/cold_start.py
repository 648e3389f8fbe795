"""The step that some recipes begin with: supervised training on trajectories made from gold supervision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core.agents.program import derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config
from pipeline.core.data.cold_start_source import ColdStartMaker
from pipeline.core.data.splits import Splits
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Example
from pipeline.core.renderer import Renderer
from pipeline.core.run import Json
from pipeline.run import Run
from retriever_service import interrupts


class ColdStart:
    """What a searcher starts from, read and checked before anything expensive.

    Raises:
        UserError: no question has the supervision that synthesis needs, or a bad trajectory file.
    """

    def __init__(self, config: Config, splits: Splits) -> None:
        self.config = config
        self.maker = ColdStartMaker(
            config.cold_start,
            config.data,
            config.retriever,
            Renderer(load_tokenizer(config.model.path), config.agent),
            config.model.max_length,
            config.seed,
        )
        self.source = None
        if config.cold_start.questions or config.cold_start.trajectories:
            self.source = self.maker.source(splits.train)

    @property
    def base_version(self) -> int:
        """The version of the searcher that is the base model: -1 if the cold start makes version 0, else 0."""
        return 0 if self.source is None else -1

    def __call__(self, run: Run) -> None:
        """Steps "0/cold_start" and "0/searcher/train": version 0, trained on the trajectories with weight 1."""
        source, cold_start = self.source, self.config.cold_start
        if source is None:
            return

        def synthesise() -> tuple[Mapping[str, Sequence[Example]], Json]:
            index = run.searched if isinstance(run.searched, Path) else run.at("index")
            cache = Path(f"{index}.rewritten.jsonl")
            examples, statistics = interrupts.run(
                self.maker.examples(source, run.cluster.retrieve, run.searched, cache)
            )
            return {SEARCHER: examples}, statistics

        run.make_examples("0/cold_start", [SEARCHER], synthesise, stay=cold_start.mix > 0)
        run.train(
            0,
            SEARCHER,
            WeightedNll(self.config.learner.negligible_weight),
            seed=derive_seed(self.config.seed, "m-step", 0),
            learning_rate=cold_start.learning_rate,
            epochs=cold_start.epochs,
        )
