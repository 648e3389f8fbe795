"""Bends the method's formulas one at a time, and shows which tests of the theory fail.

    python scripts/mutate_theory.py [--only TEXT]

Each mutation changes one expression of a module in a scratch copy of the project, where `tests/theory` then runs. The
output is a Markdown table of mutations and failing tests. Ends with status 1 if a mutation fails no test, and with 2 if
tests fail without any or a mutation does not run. `MUTATIONS` is the list: a new formula comes with a line there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pipeline", "retriever_service", "tests/theory", "pyproject.toml")
TESTS = "tests/theory"
WEIGHTING = "pipeline/core/weighting.py"
WEIGHING = "pipeline/core/weighing.py"
LOSS = "pipeline/core/losses/likelihood.py"
NORMALISED = "return found, log_sum([*found, np.log(config.floor)] if config.floor > 0 else found)"
"""Of `posterior`, with what it is divided by."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old`, which is in `file` once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def of(self, text: str) -> str:
        """
        Raises:
            ValueError: the file has changed, and the mutation no longer says where it belongs.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has {found} times, and not once: {self.old}")
        return text.replace(self.old, self.new)


MUTATIONS = (
    Mutation(
        "likelihood, posterior: mean of the log-probabilities, not their sum",
        WEIGHTING,
        "found = of_set / config.temperature",
        "found = per_token / config.temperature",
    ),
    Mutation(
        "likelihood, posterior: temperature inverted",
        WEIGHTING,
        "found = of_set / config.temperature",
        "found = of_set * config.temperature",
    ),
    Mutation(
        "likelihood, posterior: temperature also on the ratio",
        WEIGHTING,
        "found = found + log_ratios",
        "found = found + log_ratios / config.temperature",
    ),
    Mutation(
        "likelihood, posterior: no ratio",
        WEIGHTING,
        "found = found + log_ratios",
        "found = found + 0 * log_ratios",
    ),
    Mutation("posterior: no normaliser", WEIGHTING, NORMALISED, "return found, 0.0"),
    Mutation(
        "posterior: ratio outside the normaliser",
        WEIGHTING,
        NORMALISED,
        "return found, log_sum([*(found - log_ratios), np.log(config.floor) if config.floor else -np.inf])",
    ),
    Mutation(
        "normaliser: mean over the question, not sum",
        WEIGHTING,
        NORMALISED,
        f"{NORMALISED} - float(np.log(len(found)))",
    ),
    Mutation(
        "floor: behind the logarithm", WEIGHTING, NORMALISED, "return found, log_sum(found) + config.floor"
    ),
    Mutation(
        "floor: once per trajectory",
        WEIGHTING,
        NORMALISED,
        NORMALISED.replace("np.log(config.floor)", "np.log(config.floor * len(found))"),
    ),
    Mutation(
        "length_normalised: sum of the log-probabilities, not their mean",
        WEIGHTING,
        "found = per_token / config.temperature + log_ratios",
        "found = of_set / config.temperature + log_ratios",
    ),
    Mutation(
        "length_normalised: never self-normalised",
        WEIGHTING,
        "return found, log_sum(found)\n",
        "return found, 0.0\n",
    ),
    Mutation(
        "reward: its exponential as the weight",
        WEIGHTING,
        "found = _log(np.array([s.reward for s in scored])) + log_ratios",
        "found = np.array([s.reward for s in scored]) + log_ratios",
    ),
    Mutation(
        "uniform: K off by one",
        WEIGHTING,
        "return log_ratios, float(np.log(len(scored)))",
        "return log_ratios, float(np.log(len(scored) + 1))",
    ),
    Mutation(
        "several gold answers: the best one, not their sum",
        WEIGHTING,
        "log_sum([gold.log_likelihood for gold in golds])",
        "max([gold.log_likelihood for gold in golds])",
    ),
    Mutation(
        "log mean: K off by one",
        WEIGHTING,
        "return log_sum(values) - float(np.log(len(values)))",
        "return log_sum(values) - float(np.log(len(values) + 1))",
    ),
    Mutation(
        "log mean: mean of the logarithms",
        WEIGHTING,
        "return log_sum(values) - float(np.log(len(values)))",
        "return float(np.mean(values))",
    ),
    Mutation(
        "bound: no ratio",
        WEIGHTING,
        "return log_mean([s.log_likelihood + _log_ratio(s, config) for s in first])",
        "return log_mean([s.log_likelihood for s in first])",
    ),
    Mutation(
        "effective sample size: sum of the weights not squared",
        WEIGHTING,
        "np.exp(2 * total - log_sum(2 * logs))",
        "np.exp(total - log_sum(2 * logs))",
    ),
    Mutation(
        "ratio: never clipped",
        WEIGHTING,
        "min(scored.log_ratio, float(np.log(config.max_ratio)))",
        "scored.log_ratio",
    ),
    Mutation(
        "ratio: clipped from below",
        WEIGHTING,
        "min(scored.log_ratio, float(np.log(config.max_ratio)))",
        "max(scored.log_ratio, float(np.log(config.max_ratio)))",
    ),
    Mutation(
        "turns: credit of what comes behind never fades",
        WEIGHTING,
        "credits[i] += decay * credits[i + 1]",
        "credits[i] += credits[i + 1]",
    ),
    Mutation(
        "turns: gains of the logarithms",
        WEIGHTING,
        "credits = np.diff(np.exp(values - log_unit))",
        "credits = np.diff(values - log_unit)",
    ),
    Mutation("ratio: upside down", WEIGHING, "- log_q).sum())", "* -1 + log_q).sum())"),
    Mutation("ratio: mean over the tokens, not sum", WEIGHING, "- log_q).sum())", "- log_q).mean())"),
    Mutation(
        "ratio: own answer always in it",
        WEIGHING,
        "trajectory.sampled if with_answer else trajectory.sampled[: trajectory.answer_start]",
        "trajectory.sampled",
    ),
    Mutation(
        "ratio: own answer never in it",
        WEIGHING,
        "trajectory.sampled if with_answer else trajectory.sampled[: trajectory.answer_start]",
        "trajectory.sampled[: trajectory.answer_start]",
    ),
    Mutation(
        "loss: sign flipped",
        LOSS,
        "loss=-(logprobs * weights).sum() / normaliser",
        "loss=(logprobs * weights).sum() / normaliser",
    ),
    Mutation(
        "loss: weights left out",
        LOSS,
        "loss=-(logprobs * weights).sum() / normaliser",
        "loss=-logprobs.sum() / normaliser",
    ),
    Mutation(
        "loss: mean over a trajectory's tokens, not sum",
        LOSS,
        "weights = [v if v >= self.negligible_weight * c else 0.0 for v, c in zip(exact, copies, strict=True)]",
        "weights = [v / max(n, 1) for v, n in zip(exact, num_tokens, strict=True)]",
    ),
    Mutation(
        "loss: weights below half of the average left out by default",
        LOSS,
        "negligible_weight: float = 0.0",
        "negligible_weight: float = 0.5",
    ),
    Mutation(
        "iteration's average: the worse the likelier (1 / w)",
        LOSS,
        "torch.exp(torch.tensor(log_weights, dtype=torch.float64) - average)",
        "torch.exp(average - torch.tensor(log_weights, dtype=torch.float64))",
    ),
    Mutation(
        "iteration's average: over examples, not tokens",
        LOSS,
        "torch.logsumexp(logs + n.log(), dim=0)",
        "torch.logsumexp(logs + n.sum().log() - math.log(len(n)), dim=0)",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations with this in their name")
    text = parser.parse_args().only
    if not (wanted := [mutation for mutation in MUTATIONS if text in mutation.name]):
        parser.error(f"no mutation has {text!r} in its name")
    return report(wanted, ROOT)


def report(mutations: Sequence[Mutation], root: Path) -> int:
    """Print the table of these mutations of the project at `root`; gives the exit status."""
    with scratch_copy(root) as copy:
        if failed := failing_tests(copy):
            print(f"{TESTS} fails without any mutation: {', '.join(failed)}", file=sys.stderr)
            return 2
        print("| mutation | failing tests |\n|---|---|", flush=True)
        survivors = []
        for mutation in mutations:
            with applied(mutation, copy):
                failed = failing_tests(copy)
            print(f"| {mutation.name} | {'<br>'.join(failed) or '**none**'} |", flush=True)
            if not failed:
                survivors.append(mutation.name)
    if survivors:
        print(f"no test fails under: {'; '.join(survivors)}", file=sys.stderr)
    return int(bool(survivors))


@contextmanager
def scratch_copy(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = root / name, copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        yield copy


@contextmanager
def applied(mutation: Mutation, copy: Path) -> Iterator[None]:
    file = copy / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(mutation.of(text), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


def failing_tests(copy: Path) -> list[str]:
    """Names of the tests that fail there, each once.

    Raises:
        SystemExit: they could not run.
    """
    # Without bytecode: of a file that was changed within a second that of the version before may be taken.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    failed = re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or bool(failed) != bool(done.returncode):
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(2)
    return list(dict.fromkeys(failed))


if __name__ == "__main__":
    sys.exit(main())
