"""What an estimate takes for granted, all in one place: printed with it, and each can be said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, ValidationError

from pipeline.core.config import AgentConfig, Section
from pipeline.core.config.loading import parse_yaml
from pipeline.core.errors import UserError
from pipeline.core.plan.memory import Device


class Assumptions(Section):
    """Null: as the configuration or the device suggests, see `settled`."""

    questions: int | None = Field(None, ge=0)
    """Training questions. Null: those of data.train; where they cannot be read data.train_limit, or 100,000."""
    dev_questions: int | None = Field(None, ge=0)
    """Dev questions. Null: those of data.dev; else data.dev_limit, or 1,000."""
    test_questions: int | None = Field(None, ge=0)
    """Test questions. Null: those of data.test; else data.test_limit, or 1,000."""
    searches: float | None = Field(None, ge=0)
    """Of a trajectory, on average. Null: four fifths of agent.max_searches."""
    prompt_tokens: float = Field(128.0, gt=0)
    """Question and instructions."""
    passage_tokens: float = Field(150.0, gt=0)
    """Of a passage; agent.max_document_tokens at most."""
    turn_tokens: float = Field(60.0, gt=0)
    """That the model writes in a turn; agent.max_turn_tokens at most."""
    peak_tflops: float | None = Field(None, gt=0)
    """Of a GPU, or of a CPU core. Null: 989 (H100, bfloat16) or 0.2."""
    mfu: float = Field(0.35, gt=0, le=1)
    """Share of it that training reaches, over 6 operations per parameter and token, without recomputation."""
    prefill_mfu: float = Field(0.4, gt=0, le=1)
    """Share of it that an engine reaches on prompts and passages."""
    bandwidth_gb_s: float | None = Field(None, gt=0)
    """Memory bandwidth of a GPU, or of a CPU core. Null: 3350 (H100) or 10."""
    bandwidth_use: float = Field(0.6, gt=0, le=1)
    """Share of it that generation reaches."""
    push_gb_s: float | None = Field(None, gt=0)
    """Weights that a push moves in a second. Null: 10 on GPUs, 0.3 on CPUs."""

    def settled(self, agent: AgentConfig, device: Device, questions: dict[str, int | None]) -> Assumptions:
        """The same, with every null replaced.

        Args:
            questions: of the splits "train", "dev" and "test", as far as they could be counted.
        """
        gpu = device == "gpu"

        def count(own: int | None, split: str, default: int) -> int:
            found = questions.get(split)
            return own if own is not None else default if found is None else found

        return self.model_copy(
            update={
                "questions": count(self.questions, "train", 100_000),
                "dev_questions": count(self.dev_questions, "dev", 1_000),
                "test_questions": count(self.test_questions, "test", 1_000),
                "searches": 0.8 * agent.max_searches if self.searches is None else self.searches,
                "passage_tokens": min(self.passage_tokens, agent.max_document_tokens),
                "turn_tokens": min(self.turn_tokens, agent.max_turn_tokens),
                "peak_tflops": self.peak_tflops or (989.0 if gpu else 0.2),
                "bandwidth_gb_s": self.bandwidth_gb_s or (3350.0 if gpu else 10.0),
                "push_gb_s": self.push_gb_s or (10.0 if gpu else 0.3),
            }
        )


def read_assumptions(pairs: Sequence[str]) -> Assumptions:
    """From `key=value` texts.

    Raises:
        UserError: no such assumption, or not such a value.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in Assumptions.model_fields:
            raise UserError(
                f"--assume {pair}: give KEY=VALUE; keys are {', '.join(Assumptions.model_fields)}"
            )
        try:
            values[key] = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"--assume {pair}: {text!r} is not valid YAML: {error}") from error
    try:
        return Assumptions.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--assume {problem['loc'][0]}={problem['input']}: {problem['msg']}") from error
