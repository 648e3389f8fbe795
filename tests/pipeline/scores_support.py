"""Evaluations as runs leave them, for tests of what reads their scores by question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.agents.transcript import Transcript
from pipeline.core.question_scores import Scores, read_scores, scored_table
from pipeline.core.records import Question, Step, StopReason, Trajectory
from pipeline.core.run import write_table
from pipeline.core.scoring.answers import ProtocolName
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


def questions(number: int, world: str = "") -> list[Question]:
    """Of one and two hops in turn, the second half without a type; the first one names no gold passage."""
    return [
        Question(
            f"q{n}",
            f"Who is {n}{world}?",
            (f"answer {n}", f"alias {n}"),
            type="bridge" if n < number / 2 else "",
            hops=1 + n % 2,
            supporting_ids=(f"p{n}",) if n else (),
        )
        for n in range(number)
    ]


def answered(question: Question, answer: str) -> Trajectory:
    """One search, which found the question's gold passage if the answer is not empty."""
    found = tuple(Hit(Passage(id_, "", "text"), 1.0) for id_ in question.supporting_ids if answer)
    turn = Transcript(steps=[Step("query", found)])
    turn.append_environment([0])
    return turn.trajectory(
        question_id=question.id,
        sample=0,
        role="searcher",
        policy_version=0,
        stop_reason=StopReason.ANSWERED,
        answer=answer,
    )


def write_evaluation(
    path: Path, asked: Sequence[Question], right: str, protocol: ProtocolName = "exsearch"
) -> Scores:
    """One whose n-th question is answered rightly (1), half so (h), wrongly (0) or not at all (.), as `right` says."""
    said = {"1": "answer {}", "h": "answer of {}", "0": "nobody", ".": ""}
    trajectories = [
        answered(question, said[how].format(question.id[1:]))
        for question, how in zip(asked, right, strict=True)
    ]
    write_table(path, scored_table(asked, trajectories, protocol))
    found = read_scores(path)
    assert found is not None
    return found
