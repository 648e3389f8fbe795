"""The records that move between the parts of ExSearch, all frozen, and their columnar (Arrow) form.

Data moves forward once: `Question` -> `Trajectory` (sampled by a rollout worker) -> `Example` (made by the weighting
actor) -> learner. Nothing is parsed out of text again once it is a record, and nothing is tokenised again
once it is token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hop:
    """One gold reasoning step of a question: a resolved sub-query, its answer and where that is written."""

    question: str
    answer: str
    evidence: str = ""
    supporting_id: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with every accepted answer; the gold supervision beyond that is optional.

    Example:
        Question(id="2hop__1", text="Who founded the maker of X?", answers=("Ada",), type="bridge", hops=2)
    """

    id: str
    text: str
    answers: tuple[str, ...]
    type: str = ""
    hops: int | None = None
    supporting_ids: tuple[str, ...] = ()
    decomposition: tuple[Hop, ...] = ()

    @property
    def distinct_answers(self) -> tuple[str, ...]:
        """The accepted answers, each once, in their order."""
        return tuple(dict.fromkeys(self.answers))


class StopReason(StrEnum):
    """Why a trajectory ended. The first four are the model's own behaviour; the last three are not."""

    ANSWERED = "answered"
    """The model closed an answer by itself."""
    STEP_LIMIT = "step_limit"
    """The model still wanted to search after the last allowed search; an answer was demanded from it."""
    LENGTH_LIMIT = "length_limit"
    """A turn, or the whole context, ran out of tokens."""
    MALFORMED = "malformed"
    """A turn did not follow the protocol; it was cut off."""
    RETRIEVER_UNAVAILABLE = "retriever_unavailable"
    """The retriever failed for good on one of the queries."""
    RETRIEVER_BAD_ANSWER = "retriever_bad_answer"
    """The retriever refused one of the queries, or answered it with what makes no sense."""
    ENGINE_ERROR = "engine_error"
    """The inference engine failed for good."""

    @property
    def is_infrastructure(self) -> bool:
        """True if the trajectory says nothing about the model: it is retried, then excluded, never weighted."""
        return self in (
            StopReason.RETRIEVER_UNAVAILABLE,
            StopReason.RETRIEVER_BAD_ANSWER,
            StopReason.ENGINE_ERROR,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One think-search-record step as the agent lived it. `record` is empty until the model wrote one."""

    query: str
    hits: tuple[Hit, ...] = ()
    record: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled trajectory z of a question (T tokens in all).

    Layout of the three parallel arrays, for one search:

        token_ids   prompt ... | <think> q </think> | <search> ... </search> | <record> e </record> <answer> a </answer>
        loss_mask   0          | 1                  | 0                      | 1
        logprobs    NaN        | log p              | NaN                    | log p

    `token_ids[:answer_start]` ends right behind the opening answer tag; the model's own answer and the closing tag
    follow. Where the model did not open an answer the environment appended the tag (mask 0). An infrastructure
    failure has no answer: then `answer_start == T`.

    `log_likelihoods` holds log p(y | x, z) of the question's different gold answers, in their order, put in the place
    of the model's own behind `answer_start`: NaN for one that does not fit into the context, empty where nothing was
    scored. `proposal_logprobs` is log q of every token where the trajectory was sampled from another distribution than
    the model itself and that was recorded, else None: there q = p.
    """

    question_id: str
    sample: int
    policy_version: int
    token_ids: TokenIds
    loss_mask: Mask
    logprobs: Floats
    answer_start: int
    steps: tuple[Step, ...]
    answer: str
    stop_reason: StopReason
    detail: str = ""
    role: str = "searcher"
    log_likelihoods: tuple[float, ...] = ()
    proposal_logprobs: Floats | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs)}
        if len(lengths) != 1:
            raise ValueError(
                f"trajectory {self.question_id}/{self.sample}: arrays of different lengths {lengths}"
            )
        if not 0 <= self.answer_start <= len(self.token_ids):
            raise ValueError(f"trajectory {self.question_id}/{self.sample}: answer_start {self.answer_start}")

    @property
    def num_searches(self) -> int:
        return sum(1 for step in self.steps if step.hits)


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """What a program gives back for one sample of a task: a trajectory per role turn, in the order of the turns.

    `scores` are figures of the whole episode that the program found out, such as its log-probability under a reference.
    """

    task_id: str
    sample: int
    turns: tuple[Trajectory, ...]
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def failure(self) -> Trajectory | None:
        """The turn that an infrastructure failure ended, if one did: then the episode says nothing about the models."""
        return next((turn for turn in self.turns if turn.stop_reason.is_infrastructure), None)

    def turn(self, role: str) -> Trajectory:
        """The first turn of a role.

        Raises:
            ValueError: it has none.
        """
        for turn in self.turns:
            if turn.role == role:
                return turn
        raise ValueError(f"episode {self.task_id}/{self.sample} has no turn of the role {role}")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest:
    """Asks for log p(token_ids[i] | token_ids[:i]) for every i >= start."""

    token_ids: TokenIds
    start: int

    @classmethod
    def of(cls, token_ids: Sequence[int], start: int) -> ScoreRequest:
        return cls(np.asarray(token_ids, dtype=np.int32), start)


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A training example: token ids, which of them are targets, and the numbers that a loss needs.

    Attributes:
        id: unique in a phase, "q17/3".
        unit: examples of one unit (a pair, a group) are never split, neither over optimiser steps nor over packed rows;
            its own id where it stands alone.
        role: of the turn that it was made of.
        loss_mask: [T], True for a target. The first token never is one: nothing comes before it.
        streams: by name one number ([1]), one per token ([T]), or R per target ([targets, R]); float64.
    """

    id: str
    unit: str
    role: str
    token_ids: TokenIds
    loss_mask: Mask
    streams: Mapping[str, Numbers]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(
                f"example {self.id}: {len(self.token_ids)} ids and {len(self.loss_mask)} mask flags"
            )
        for name, values in self.streams.items():
            fits = len(values) in ((1, len(self.token_ids)) if values.ndim == 1 else (self.num_targets,))
            if not fits:
                raise ValueError(
                    f"example {self.id}: stream {name} has the shape {list(values.shape)}; it must have one number, "
                    f"one per token ({len(self.token_ids)}), or a row per target ({self.num_targets})"
                )

    @classmethod
    def of(cls, trajectory: Trajectory, **streams: float) -> Example:
        """A trajectory as it is, with one number per stream."""
        name = f"{trajectory.question_id}/{trajectory.sample}"
        return cls(
            name,
            name,
            trajectory.role,
            trajectory.token_ids,
            trajectory.loss_mask,
            {stream: np.array([value]) for stream, value in streams.items()},
        )

    @classmethod
    def supervised(cls, name: str, role: str, prompt: Sequence[int], target: Sequence[int]) -> Example:
        """A prompt and what should follow it, with weight 1."""
        return cls(
            name,
            name,
            role,
            np.asarray([*prompt, *target], dtype=np.int32),
            np.repeat([False, True], [len(prompt), len(target)]),
            {"weight": np.ones(1)},
        )

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on and have a token before them in the example."""
        return int(self.loss_mask[1:].sum())

    def number(self, stream: str) -> float:
        """A stream of one number.

        Raises:
            ValueError: it is not there, or has several.
        """
        values = self.streams.get(stream)
        if values is None or len(values) != 1:
            found = "no" if values is None else len(values)
            raise ValueError(f"example {self.id} must have one number as {stream}, has {found}")
        return float(values[0])


_HIT = pa.struct(
    [("id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("score", pa.float32())]
)
_STEP = pa.struct([("query", pa.string()), ("hits", pa.list_(_HIT)), ("record", pa.string())])

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("sample", pa.int32()),
        ("policy_version", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("answer_start", pa.int32()),
        ("steps", pa.list_(_STEP)),
        ("answer", pa.string()),
        ("stop_reason", pa.string()),
        ("detail", pa.string()),
        ("role", pa.string()),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("proposal_logprobs", pa.list_(pa.float32())),
    ]
)

EXAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("unit", pa.string()),
        ("role", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        # `width` is R of a stream of rows, else 0.
        (
            "streams",
            pa.map_(pa.string(), pa.struct([("values", pa.list_(pa.float64())), ("width", pa.int32())])),
        ),
    ]
)


def _plain(value: Any) -> Any:
    """A record as the nested lists and dictionaries that Arrow takes."""
    if isinstance(value, Hit):
        return dataclasses.asdict(value.passage) | {"score": value.score}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def trajectories_to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """One row per trajectory, `TRAJECTORY_SCHEMA`."""
    return pa.Table.from_pylist([_plain(t) for t in trajectories], schema=TRAJECTORY_SCHEMA)


def examples_to_table(examples: Iterable[Example]) -> pa.Table:
    """One row per example, `EXAMPLE_SCHEMA`."""
    rows = [
        _plain(example)
        | {
            "streams": [
                (name, {"values": values.ravel(), "width": 0 if values.ndim == 1 else values.shape[1]})
                for name, values in example.streams.items()
            ]
        }
        for example in examples
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def _hit(row: dict[str, Any]) -> Hit:
    return Hit(passage=Passage(id=row["id"], title=row["title"], text=row["text"]), score=row["score"])


def _step(row: dict[str, Any]) -> Step:
    return Step(query=row["query"], hits=tuple(_hit(h) for h in row["hits"]), record=row["record"])


def _floats(values: list[float] | None) -> Floats | None:
    return None if values is None else np.asarray(values, dtype=np.float32)


def trajectories_from_table(table: pa.Table) -> list[Trajectory]:
    """Inverse of `trajectories_to_table`.

    Raises:
        ValueError: the table has other columns.
    """
    _check_columns(table, TRAJECTORY_SCHEMA)
    return [
        Trajectory(
            question_id=row["question_id"],
            sample=row["sample"],
            policy_version=row["policy_version"],
            token_ids=np.asarray(row["token_ids"], dtype=np.int32),
            loss_mask=np.asarray(row["loss_mask"], dtype=np.bool_),
            logprobs=np.asarray(row["logprobs"], dtype=np.float32),
            answer_start=row["answer_start"],
            steps=tuple(_step(s) for s in row["steps"]),
            answer=row["answer"],
            stop_reason=StopReason(row["stop_reason"]),
            detail=row["detail"],
            role=row["role"],
            log_likelihoods=tuple(row["log_likelihoods"]),
            proposal_logprobs=_floats(row["proposal_logprobs"]),
        )
        for row in table.to_pylist()
    ]


def examples_from_table(table: pa.Table) -> list[Example]:
    """Inverse of `examples_to_table`.

    Raises:
        ValueError: the table has other columns.
    """
    _check_columns(table, EXAMPLE_SCHEMA)
    return [
        Example(
            id=row["id"],
            unit=row["unit"],
            role=row["role"],
            token_ids=np.asarray(row["token_ids"], dtype=np.int32),
            loss_mask=np.asarray(row["loss_mask"], dtype=np.bool_),
            streams={name: _stream(**stored) for name, stored in row["streams"]},
        )
        for row in table.to_pylist()
    ]


def _stream(values: list[float], width: int) -> Numbers:
    flat = np.asarray(values, dtype=np.float64)
    return flat.reshape(-1, width) if width else flat


def _check_columns(table: pa.Table, schema: pa.Schema) -> None:
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise ValueError(
            f"the columns {', '.join(missing)} are missing: the file holds something else, or was written by another "
            "version; make it again"
        )


def count_stop_reasons(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Number of trajectories per stop reason, every reason present (0 included)."""
    counts = {reason.value: 0 for reason in StopReason}
    for trajectory in trajectories:
        counts[trajectory.stop_reason.value] += 1
    return counts
