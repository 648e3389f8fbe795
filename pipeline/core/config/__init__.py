"""The whole configuration, typed and validated.

A configuration is a YAML file plus `key=value` overrides. Unknown keys are errors with a suggestion. Every field has
one line under it: what it does, its unit. `docs/configuration.md` is generated from this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.core.config.cluster import ClusterConfig, TrackingConfig
from pipeline.core.config.method import (
    METHODS_OF,
    ColdStartConfig,
    EmConfig,
    EvaluationConfig,
    Iterations,
    LearnerConfig,
    LoraConfig,
    RolloutConfig,
    Rounds,
    WeightingConfig,
)
from pipeline.core.config.section import OnDisk, Section, as_method
from pipeline.core.config.storage import StorageConfig
from pipeline.core.config.task import WITH_SERVER, AgentConfig, DataConfig, ModelConfig, RetrieverConfig, Tags

__all__ = [
    "EXSEARCH",
    "WITH_SERVER",
    "AgentConfig",
    "ClusterConfig",
    "ColdStartConfig",
    "Config",
    "DataConfig",
    "EmConfig",
    "EvaluationConfig",
    "Iterations",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "OnDisk",
    "RetrieverConfig",
    "RolloutConfig",
    "Rounds",
    "Section",
    "StorageConfig",
    "Tags",
    "TrackingConfig",
    "WeightingConfig",
]


EXSEARCH = "exsearch"
"""The recipe whose sections are `em`, `weighting` and `cold_start`."""


def section_of(recipe: str) -> str:
    """The name of a recipe's own section."""
    return "em" if recipe == EXSEARCH else recipe


class Config(Section):
    recipe: str = EXSEARCH
    """Training method: `exsearch`, or a module of `pipeline/recipes` (docs/recipes.md). Another recipe than ExSearch
    has its own keys in a section of its name."""
    seed: int = Field(0, ge=0)
    """Seed of everything: data order, sampling, initialisation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    agent: AgentConfig = AgentConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    rollout: RolloutConfig = RolloutConfig()
    weighting: Annotated[WeightingConfig, BeforeValidator(as_method)] = WeightingConfig()
    learner: LearnerConfig = LearnerConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    em: EmConfig = EmConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def section(self) -> str:
        """The name of the recipe's own section."""
        return section_of(self.recipe)

    @property
    def of_recipe(self) -> Any:
        """The section of the recipe, of the type that its module declares as `Settings`; ExSearch's is `em`."""
        return getattr(self, self.section)

    @property
    def most_samples(self) -> int:
        """Trajectories of a training question, at most."""
        most: int = self.of_recipe.most_samples(self.rollout.samples)
        return most

    @property
    def starts_from_data_root(self) -> bool:
        """Whether a path to data is relative."""
        data = self.data
        paths = [*data.corpus, *data.train, *data.dev, *data.test, *self.cold_start.sources]
        return any(not path.startswith("hf:") and not Path(path).is_absolute() for path in paths)

    @model_validator(mode="after")
    def _of_one_recipe(self) -> Config:
        for name in () if self.recipe == EXSEARCH else ("em", "weighting", "cold_start"):
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and name not in self.of_recipe.reads:
                raise ValueError(
                    f"{name} is a section of the recipe {EXSEARCH} and says nothing to {self.recipe}, whose own keys "
                    f"are in the section {self.recipe}; remove it"
                )
        return self

    def _has_an_effect(self) -> None:
        weighting, defaults = self.weighting, WeightingConfig()
        for key, methods in METHODS_OF.items():
            if getattr(weighting, key) != getattr(defaults, key) and weighting.method not in methods:
                raise ValueError(
                    f"weighting.{key} belongs to method: {' or '.join(methods)}, not {weighting.method}; remove it"
                )
        if weighting.max_ratio != defaults.max_ratio and not weighting.correct_proposal:
            raise ValueError("weighting.max_ratio belongs to weighting.correct_proposal: true; remove it")
        if weighting.credit_decay != defaults.credit_decay and weighting.credit != "turn":
            raise ValueError("weighting.credit_decay belongs to weighting.credit: turn; remove it")

    def _turns_can_be_scored(self) -> None:
        weighting = self.weighting
        wants = "weighting.credit: turn" if weighting.credit == "turn" else "weighting.subtract_baseline"
        if weighting.scored_turns != "none":
            if weighting.method not in ("likelihood", "posterior"):
                raise ValueError(
                    f"{wants} belongs to method: likelihood or posterior, not {weighting.method}; remove it"
                )
            if not self.agent.think:
                raise ValueError(f"{wants} needs turns to look at, and agent.think is off; remove it")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        weighting = self.weighting
        if self.rollout.samples < 2 and weighting.compares:
            raise ValueError(
                f"weighting.method: {weighting.method} compares the trajectories of a question with each other and "
                "needs rollout.samples of at least 2, not 1; raise rollout.samples or use weighting=likelihood"
            )
        self._has_an_effect()
        self._turns_can_be_scored()
        if self.em.hinted:
            if self.em.hinted >= self.rollout.samples:
                raise ValueError(
                    f"em.hinted ({self.em.hinted}) must leave some of the rollout.samples ({self.rollout.samples}) "
                    "without a hint; lower the first or raise the second"
                )
            if not weighting.correct_proposal:
                raise ValueError(
                    "em.hinted samples from another distribution than the model's own; set "
                    "weighting.correct_proposal=true"
                )
        if self.cold_start.mix > 0 and not self.cold_start.questions and self.cold_start.trajectories is None:
            raise ValueError(
                "cold_start.mix needs cold-start examples: set cold_start.questions or cold_start.trajectories, or mix "
                "to 0"
            )
        if self.learner.tokens_per_microbatch < self.model.max_length:
            raise ValueError(
                f"learner.tokens_per_microbatch ({self.learner.tokens_per_microbatch}) must hold the longest example "
                f"(model.max_length: {self.model.max_length}); raise the first or lower the second"
            )
        return self
