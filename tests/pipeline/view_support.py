"""A run directory with trajectories that can be read, made without Ray, for tests of what shows runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoTokenizer

from pipeline.core.agents.program import Completion
from pipeline.core.agents.transcript import Transcript
from pipeline.core.question_scores import scored_table
from pipeline.core.records import Episode, Example, Question, Step, StopReason, Trajectory
from pipeline.core.run import write_json, write_table
from pipeline.core.shards import Shards
from pipeline.core.weighing import Facts, Weighted
from pipeline.core.weighting import Scored
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit
from tests.pipeline.commands_support import ROOT
from tests.retriever_service.support import write_jsonl

TINY = ROOT / "models" / "tiny-searcher"
PER_SHARD = 2
NOTHING = {**asdict(Scored(0.0, 0.0)), "log_likelihood": None, "per_token": None}
"""A trajectory that makes the gold answers impossible."""
HOSTILE = "<img src=x onerror=alert(1)></script>"
"""In a passage: text must stay text."""


def asked(number: int) -> list[Question]:
    """The n-th has n % 3 + 1 hops and two gold passages."""
    return [
        Question(f"q{n}/ä?#", f"Who founded {n}?", (f"Ada {n}",), "bridge", 1 + n % 3, (f"gold{n}", "both"))
        for n in range(number)
    ]


class Writer:
    """Writes a run into `path`, of questions that lie beside it."""

    def __init__(self, path: Path, questions: Sequence[Question]) -> None:
        self.path, self.questions = path, list(questions)
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        data = path.parent / f"{path.name}-data"
        rows = [
            {"id": q.id, "question": q.text, "answers": list(q.answers), "type": q.type, "hops": q.hops,
             "supporting_ids": list(q.supporting_ids)}
            for q in questions
        ]  # fmt: skip
        data.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            write_jsonl(data / f"{split}.jsonl", rows)
        path.mkdir(parents=True)
        sections = {
            "model": {"path": str(TINY)},
            "data": {"root": str(data), **{split: [f"{split}.jsonl"] for split in ("train", "dev", "test")}},
            "em": {"iterations": 2},
        }
        (path / "config.yaml").write_text(yaml.safe_dump(sections))

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text).input_ids
        return found

    def trajectory(self, question: Question, sample: int, *, right: bool, version: int = 0) -> Trajectory:
        """One search, which finds the first gold passage if the answer is right. The last turn is not trained."""
        turn = Transcript()
        turn.append_environment(self.ids(f"Question: {question.text}\n"))
        self._say(turn, "<think> Who founded it? </think>", -0.5)
        turn.append_environment(self.ids("\n<search>\n[1] Maker\n</search>\n"))
        found = question.supporting_ids[0] if right else "other"
        turn.steps.append(Step("Who founded it?", (Hit(Passage(found, "Maker", HOSTILE), 0.75),), "Ada did."))
        begin = len(turn.token_ids)
        answer = question.answers[0] if right else "nobody"
        self._say(turn, f"<answer> {answer} </answer>", -1.0)
        turn.refuse(begin, len(turn.token_ids))
        return turn.trajectory(
            question_id=question.id,
            sample=sample,
            role="searcher",
            policy_version=version,
            stop_reason=StopReason.ANSWERED,
            answer=answer,
        )

    def _say(self, turn: Transcript, text: str, logprob: float) -> None:
        ids = self.ids(text)
        turn.append_model(Completion(ids, [logprob] * len(ids), text, None, "stop"))

    def sampled(
        self,
        iteration: int,
        *,
        samples: int = 2,
        shards: int | None = None,
        loose: Sequence[int] = (),
        likelihoods: Sequence[float | None] = (0.0, -2.0),
    ) -> None:
        """Of each question the first sample is right. `shards`: so many are complete; `loose`: questions of others;
        `likelihoods`: of the samples, in which null is the logarithm of zero."""
        self._likelihoods = list(likelihoods)
        folder = self.path / "iterations" / f"{iteration:04d}"
        made = Shards(
            self.questions, folder / "rollouts", {"searcher": folder / "searcher" / "examples"}, PER_SHARD
        )
        made.resume()
        for number in range(len(made) if shards is None else shards):
            made.write(number, [self._done(q, samples) for q in made.members(number)])  # type: ignore[arg-type]
        if loose:
            made.write_loose({self.questions[n].id: self._done(self.questions[n], samples) for n in loose})
        if shards is None:
            write_json(folder / "sample.json", {"generated_tokens": 1, "seconds": 1.0, "stop_reasons": {}})

    def _done(self, question: Question, samples: int) -> tuple[list[Episode], Weighted]:
        turns = [self.trajectory(question, k, right=k == 0) for k in range(samples)]
        likelihoods = self._likelihoods[:samples]
        examples = [
            Example.of(t, log_weight=value)
            for t, value in zip(turns, likelihoods, strict=True)
            if value is not None
        ]
        statistics: dict[str, Any] = {
            "scored": [
                asdict(Scored(value, value / 3)) if value is not None else NOTHING for value in likelihoods
            ],
            "log_weights": likelihoods,
            "facts": [
                asdict(Facts(k, 1, float(k == 0), float(k == 0), float(k == 0), None, None))
                for k in range(samples)
            ],
            "hinted": [False] * samples,
        }
        episodes = [Episode(question.id, turn.sample, (turn,)) for turn in turns]
        return episodes, Weighted({"searcher": examples}, statistics)

    def evaluated(self, stem: str, right: str) -> None:
        """A finished evaluation, say "test/best". The n-th answer is right if `right` says 1."""
        trajectories = [
            self.trajectory(q, 0, right=how == "1", version=1)
            for q, how in zip(self.questions, right, strict=True)
        ]
        write_table(self.path / f"{stem}.parquet", scored_table(self.questions, trajectories, "exsearch"))
        em = 100 * float(np.mean([how == "1" for how in right]))
        write_json(self.path / f"{stem}.json", {"n": len(right), "em": em, "seconds": 1.0})
