"""An EM iteration against the sum of its phases at their limits.

    python -m bench.iteration [--questions 100] [--runs 5] [--json FILE]

Ours is the wall time of E-step, M-step, checkpoint with exported model, and push, as a run takes them one after the
other, on engines and ranks that are up; the dev evaluation that follows is left out. The limits, of the same
requests, examples and bytes, in turn with ours:

- E-step: engines alone, then the retriever with full batches (the limit of `bench.estep`);
- M-step: a plain torch loop with padded batches on all cores, over those examples that the learner trains (the limit of
  `bench.learner`);
- push: one copy in memory;
- checkpoint: nothing. It has to be written, but need not be waited for.

The second is no bound: the learner packs, and computes common beginnings once, which can make up for what is lost
elsewhere. The seconds of each phase are printed, so that one sees where the ratio comes from.

The learning rate is so small that no weight moves: every iteration is the same, on a learner that goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np

from actors.weight_transfer import PushReport
from bench.estep import Bench, opened
from bench.learner import padded
from bench.measure import HEADER, RUNS, TINY, Brevity, Ratio, circumstances, print_table, write_ratios
from pipeline.core.agents.search import SEARCHER
from pipeline.core.example_files import read_examples
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example

QUESTIONS, FEW = 100, 20
STILL = 1e-30
"""A learning rate."""
GOAL = 1 / 1.15

Seconds = dict[str, float]
"""By phase."""


class Iteration:
    """Both sides, on a bench of the E-step."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._policy = bench.cluster.policy(SEARCHER)
        self._loss = WeightedNll(bench.config.learner.negligible_weight)
        self._examples: list[Example] = []
        self._num_bytes = 0

    def ours(self, *, noting: bool = False) -> Seconds:
        """An iteration; the next one begins with the version that it made."""
        bench, policy, at = self._bench, self._policy, self._bench.fresh()
        seconds = {"E-step": bench.e_step(at, noting=noting)}
        shards = sorted((at / "examples").glob("*.parquet"))
        clock = time.perf_counter
        began = clock()
        policy.train(shards, self._loss, state=at / "learner", seed=0, learning_rate=STILL)
        trained = clock()
        bench.model = policy.save(policy.current.version + 1, state=at / "learner", model=at / "model")
        saved = clock()
        report = policy.push()
        seconds |= {"M-step": trained - began, "checkpoint": saved - trained, "push": clock() - saved}
        assert isinstance(report, PushReport)
        self._num_bytes = report.nbytes
        examples = [example for shard in shards for example in read_examples(shard)]
        self._examples = list(itertools.compress(examples, self._loss.prepare(examples).computed))
        return seconds

    def limit(self) -> Seconds:
        """Of the last iteration."""
        requests = self._bench.limit()
        epoch = sum(len(example.token_ids) for example in self._examples) / padded(TINY, self._examples)()
        weights = np.ones(self._num_bytes, np.uint8)
        began = time.perf_counter()
        weights.copy()
        copy = time.perf_counter() - began
        return {"E-step": requests, "M-step": epoch, "checkpoint": 0.0, "push": copy}


def measure(questions: int, runs: int) -> tuple[list[Seconds], list[Seconds]]:
    """Of ours and of the limit, one per run, behind one of each that does not count."""
    with opened(TINY, questions) as bench:
        iteration = Iteration(bench)
        iteration.ours(noting=True), iteration.limit()
        rounds = [(iteration.ours(), iteration.limit()) for _ in range(runs)]
    return [ours for ours, _ in rounds], [limit for _, limit in rounds]


def ratio_of(questions: int, ours: list[Seconds], limit: list[Seconds]) -> Ratio:
    """Questions per second of an iteration."""

    def rates(rounds: list[Seconds]) -> list[float]:
        return [questions / sum(seconds.values()) for seconds in rounds]

    what = f"EM iteration, {questions} questions"
    return Ratio(what, "its phases at their limits", "questions", rates(ours), rates(limit), GOAL)


def run() -> list[Ratio]:
    """For the table of `python -m bench`."""
    questions = FEW if Brevity.is_on else QUESTIONS
    return [ratio_of(questions, *measure(questions, Brevity.runs()))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="as of `python -m bench`")
    arguments, when = parser.parse_args(), circumstances()
    ours, limit = measure(arguments.questions, arguments.runs)
    ratio = ratio_of(arguments.questions, ours, limit)
    print_table(HEADER, [ratio.cells()])
    if arguments.json is not None:
        write_ratios(arguments.json, [ratio], when)
    rows = [
        [phase, *(f"{statistics.median(one[phase] for one in rounds):.3f}" for rounds in (ours, limit))]
        for phase in ours[0]
    ]
    print_table("phase; ours, s (median); at its limit, s", rows)


if __name__ == "__main__":
    main()
