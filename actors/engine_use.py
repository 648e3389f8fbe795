"""What an engine did, in figures: how much of its prompts it found in its cache, and how often the cache was full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors import metrics


@dataclass(frozen=True, slots=True)
class EngineUse:
    """Of one engine, or of several together.

    Attributes:
        prompt_tokens: of requests that looked into the prefix cache, those of turns and those of scores.
        cached_tokens: of them those that were found there.
        preemptions: requests that were thrown out of a full cache and had to be computed again.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    def __add__(self, other: EngineUse) -> EngineUse:
        return EngineUse(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.preemptions + other.preemptions,
        )

    def __sub__(self, other: EngineUse) -> EngineUse:
        return EngineUse(
            self.prompt_tokens - other.prompt_tokens,
            self.cached_tokens - other.cached_tokens,
            self.preemptions - other.preemptions,
        )

    @property
    def cache_hits(self) -> float:
        """Percentage of the prompt tokens that were found in the cache."""
        return 100 * self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def figures(self) -> dict[str, float]:
        """For the run directory."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cache_hits": self.cache_hits,
            "preemptions": self.preemptions,
        }


class UseCounter:
    """Counts from an engine's start on. A logger of statistics in vLLM's sense (`StatLoggerBase`)."""

    def __init__(self) -> None:
        self.use = EngineUse()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called after every step that changed something."""
        step = EngineUse()
        if scheduler_stats is not None:
            found = scheduler_stats.prefix_cache_stats
            step += EngineUse(prompt_tokens=found.queries, cached_tokens=found.hits)
        if iteration_stats is not None:
            step += EngineUse(preemptions=iteration_stats.num_preempted_reqs)
        self.use += step
        metrics.PROMPT_TOKENS.add(step.prompt_tokens)
        metrics.CACHED_TOKENS.add(step.cached_tokens)
        metrics.PREEMPTIONS.add(step.preemptions)

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        pass
