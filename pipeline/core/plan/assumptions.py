"""What an estimate takes for granted, all in one place: printed with it, and each can be said otherwise.

Nulls are looked up in the data where that is there (`pipeline.core.plan.observed`), and settled without it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, ValidationError

from pipeline.core.config import AgentConfig, Section
from pipeline.core.config.loading import parse_yaml
from pipeline.core.errors import UserError
from pipeline.core.plan.memory import Device


class Assumptions(Section):
    questions: int | None = Field(None, ge=0)
    """Training questions. Null: those of data.train, else data.train_limit, or 100,000."""
    dev_questions: int | None = Field(None, ge=0)
    """Dev questions. Null: those of data.dev, else data.dev_limit, or 1,000."""
    test_questions: int | None = Field(None, ge=0)
    """Test questions. Null: those of data.test, else data.test_limit, or 1,000."""
    searches: float | None = Field(None, ge=0)
    """Of a trajectory, on average. Null: as many as questions of data.train have gold passages, else four fifths of
    agent.max_searches."""
    prompt_tokens: float | None = Field(None, gt=0)
    """Question and instructions. Null: as in data.train, else 128."""
    passage_tokens: float | None = Field(None, gt=0)
    """Of a passage, as it is shown. Null: as in data.corpus or retriever.index, else 150, or agent.max_document_tokens
    if that is less."""
    turn_tokens: float | None = Field(None, gt=0)
    """That the model writes in a turn, agent.max_turn_tokens at most. Null: as many as questions of data.train have (a
    sub-query is shorter, a record longer), else 60."""
    peak_tflops: float | None = Field(None, gt=0)
    """Of a GPU, or of a CPU core. Null: 989 (H100, bfloat16); what a core of this machine does where that is planned
    for and has no GPU, else 0.2."""
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

    def settled(self, agent: AgentConfig, device: Device) -> Assumptions:
        """The same, with every null replaced."""
        gpu = device == "gpu"
        usual = {
            "questions": 100_000,
            "dev_questions": 1_000,
            "test_questions": 1_000,
            "searches": 0.8 * agent.max_searches,
            "prompt_tokens": 128.0,
            "passage_tokens": min(150.0, agent.max_document_tokens),
            "turn_tokens": 60.0,
            "peak_tflops": 989.0 if gpu else 0.2,
            "bandwidth_gb_s": 3350.0 if gpu else 10.0,
            "push_gb_s": 10.0 if gpu else 0.3,
        }
        settled = {key: value for key, value in usual.items() if getattr(self, key) is None}
        complete = self.model_copy(update=settled)
        assert complete.turn_tokens is not None
        return complete.model_copy(
            update={"turn_tokens": min(complete.turn_tokens, float(agent.max_turn_tokens))}
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
