"""The records that move between the parts of ExSearch, all frozen.

Data moves forward once: `Question` -> `Trajectory` (sampled by a rollout worker) -> `Example` (made by the weighting
actor) -> learner. Nothing is parsed out of text again once it is a record, and nothing is tokenised again
once it is token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

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
class Paragraph:
    """A paragraph that a data set gives along with a question. Sets without sentences have one per paragraph."""

    title: str
    sentences: tuple[str, ...]
    id: str = ""
    """In the corpus; empty where the row names none."""

    @property
    def text(self) -> str:
        """The whole paragraph. Some sets begin a sentence with its space, others do not."""
        return " ".join(sentence.strip() for sentence in self.sentences if sentence.strip())


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a data set's own row says of a question's evidence, in the set's own terms: evaluation protocols compare
    with it, and nothing is trained on it. Each field is empty where the row does not have it.
    """

    supporting_facts: tuple[tuple[str, int], ...] = ()
    """(title, number of the sentence from 0): HotpotQA, 2WikiMultihopQA."""
    triples: tuple[tuple[str, str, str], ...] = ()
    """(subject, relation, object): 2WikiMultihopQA's `evidences`."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Other names of the entities of the triples."""
    context: tuple[Paragraph, ...] = ()
    """The paragraphs in the order of the row, distractors among them."""
    supporting_paragraphs: tuple[int, ...] = ()
    """Places of the gold ones in `context`, from 0."""
    provenance: tuple[tuple[str, ...], ...] = ()
    """KILT: one group of Wikipedia pages (ids) per accepted way to find the answer."""


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
    evidence: Evidence | None = field(default=None, repr=False)
    """Only where it was asked for (`read_questions`). Says nothing of what a question is trained on: by its `repr` a
    run knows it again."""
    max_answers: int | None = field(default=None, repr=False)
    """As many answers are scored (`data.max_answers`, by which a run stays). None: all."""

    @property
    def distinct_answers(self) -> tuple[str, ...]:
        """The accepted answers whose likelihoods count, each once, in their order; the first is the canonical one."""
        return tuple(dict.fromkeys(self.answers))[: self.max_answers]


class StopReason(StrEnum):
    """Why a trajectory ended. The first four are the model's own behaviour; the last four are not."""

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
    ACTION_UNAVAILABLE = "action_unavailable"
    """What an action of the user's needs could not be reached, or took too long."""
    ENGINE_ERROR = "engine_error"
    """The inference engine failed for good."""

    @property
    def is_infrastructure(self) -> bool:
        """True if the trajectory says nothing about the model: it is retried, then excluded, never weighted."""
        return self in (
            StopReason.RETRIEVER_UNAVAILABLE,
            StopReason.RETRIEVER_BAD_ANSWER,
            StopReason.ACTION_UNAVAILABLE,
            StopReason.ENGINE_ERROR,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One think-search-record step as the agent lived it, or a call of an action.

    Attributes:
        query: the sub-query, or the call.
        record: empty until the model wrote one.
        selected: places among the hits of those that the model selected, from 0, the best first.
        action, result: of a call; of a search both are empty.
    """

    query: str
    hits: tuple[Hit, ...] = ()
    record: str = ""
    selected: tuple[int, ...] = ()
    action: str = ""
    result: str = ""

    @property
    def used_hits(self) -> tuple[Hit, ...]:
        """What the record can be taken from: the selected passages in their order, all where nothing was selected."""
        return tuple(self.hits[place] for place in self.selected) or self.hits


def step_as_json(step: Step) -> dict[str, Any]:
    """For programs: `exsearch ask --json`, pages of `exsearch view`."""
    return {
        "query": step.query,
        "hits": [
            {"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score}
            for h in step.hits
        ],
        "record": step.record,
        "selected": list(step.selected),
        "action": step.action,
        "result": step.result,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled trajectory z of a question (T tokens in all).

    Layout of the three parallel arrays, for one search:

        token_ids   prompt ... | <think> q </think> | <search> ... </search> | <record> e </record> <answer> a </answer>
        loss_mask   0          | 1                  | 0                      | 1
        logprobs    NaN        | log p              | NaN                    | log p

    Where the agent selects, the model's turn behind the passages begins with <select> [2] > [1] </select>. A sub-query
    or call that was refused, because no search was left or no room for its passages, is not trained: its mask is 0.

    `token_ids[:answer_start]` ends right behind the opening answer tag; the model's own answer and the closing tag
    follow. Where the model did not open an answer the environment appended the tag (mask 0). An infrastructure
    failure has no answer: then `answer_start == T`. Where one token of the model's holds the end of the tag and the
    beginning of its answer (`>"`), `answer_start` lies in front of it, and `answer_opening` has the ids of the rest of
    the tag: with them another answer can be put in place (`answer_context`).

    `log_likelihoods` holds log p(y | x, z) of the question's different gold answers, in their order, put in the place
    of the model's own behind `answer_context`: NaN for one that does not fit into the context, empty where nothing was
    scored. `turn_log_likelihoods` holds, in front of as many of the model's turns as were asked for (`turn_starts`),
    the log of how likely the set of these answers is if an answer is demanded there.

    `proposal_logprobs` is log q of every token where the trajectory was sampled from another distribution than the
    model itself and that was recorded, else None: there q = p. A trajectory that was sampled with a hint in its prompt
    is here without; its q knows the hint.
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
    answer_opening: tuple[int, ...] = ()
    turn_log_likelihoods: tuple[float, ...] = ()

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

    @property
    def answer_context(self) -> TokenIds:
        """What an answer stands behind: it ends with the opening answer tag and nothing more."""
        opening = np.asarray(self.answer_opening, dtype=np.int32)
        return np.concatenate([self.token_ids[: self.answer_start], opening])

    @property
    def sampled(self) -> Mask:
        """[T], True on every token that the model wrote, also on those that are not trained on."""
        return ~np.isnan(self.logprobs)

    @property
    def turn_starts(self) -> npt.NDArray[np.int64]:
        """Where the model's turns in front of its answer begin. Turns with nothing of the environment between them
        are one."""
        own = self.sampled[: self.answer_start]
        return np.flatnonzero(own & ~np.concatenate([[False], own[:-1]]))


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


class Outline(Protocol):
    """What is known of a training example without its tokens; an `Example` is one."""

    @property
    def id(self) -> str:
        """As in `Example`; the others too."""

    @property
    def unit(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def length(self) -> int:
        """Tokens."""

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on and have a token before them in the example."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the streams, by name."""

    def number(self, stream: str) -> float:
        """A stream of one number.

        Raises:
            ValueError: it is not there, or has several.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredOutline:
    """The outline of an example that is on disk. `numbers` are the streams of one number."""

    id: str
    unit: str
    role: str
    length: int
    num_targets: int
    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        _check_streams(self)

    def number(self, stream: str) -> float:
        if stream not in self.numbers:
            raise _not_one_number(self, stream)
        return self.numbers[stream]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A training example: token ids, which of them are targets, and the numbers that a loss needs.

    Attributes:
        id: unique in a phase, "q17/3".
        unit: examples of one unit (a pair, the trajectories of a question) are in one optimiser step, and in one packed
            row where the loss compares them or they fit; its own id where it stands alone.
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
        _check_streams(self)

    @classmethod
    def of(cls, trajectory: Trajectory, **streams: float | Numbers) -> Example:
        """A trajectory as it is, with one number per stream or one per token. Those of a question are a unit."""
        return cls(
            f"{trajectory.question_id}/{trajectory.sample}",
            trajectory.question_id,
            trajectory.role,
            trajectory.token_ids,
            trajectory.loss_mask,
            {stream: np.atleast_1d(np.asarray(value, dtype=np.float64)) for stream, value in streams.items()},
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
            {"log_weight": np.zeros(1)},
        )

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        return count_targets(self.loss_mask)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: values.shape for name, values in self.streams.items()}

    def number(self, stream: str) -> float:
        values = self.streams.get(stream)
        if values is None or len(values) != 1:
            raise _not_one_number(self, stream)
        return float(values[0])


def count_targets(loss_mask: Mask) -> int:
    return int(np.count_nonzero(loss_mask[1:]))


def _check_streams(example: Outline) -> None:
    """
    Raises:
        ValueError: a stream that fits neither the example nor its tokens nor its targets.
    """
    for name, shape in example.shapes.items():
        if shape[0] not in ((1, example.length) if len(shape) == 1 else (example.num_targets,)):
            raise ValueError(
                f"example {example.id}: stream {name} has the shape {list(shape)}; it must have one number, one per "
                f"token ({example.length}), or a row per target ({example.num_targets})"
            )


def _not_one_number(example: Outline, stream: str) -> ValueError:
    found = example.shapes[stream][0] if stream in example.shapes else "no"
    return ValueError(f"example {example.id} must have one number as {stream}, has {found}")


def count_stop_reasons(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Number of trajectories per stop reason, every reason present (0 included)."""
    counts = {reason.value: 0 for reason in StopReason}
    for trajectory in trajectories:
        counts[trajectory.stop_reason.value] += 1
    return counts
