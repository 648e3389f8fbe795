"""ExSearch's report: the iterations as those of generalised EM. docs/formats.md describes it field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.comparison import compare_metrics
from pipeline.core.config import Config
from pipeline.core.question_scores import Scores
from pipeline.core.report import (
    DEV_BOUND,
    DEV_SAMPLES,
    EVALUATION,
    Column,
    Outcome,
    dev_scores,
    report_of,
)
from pipeline.core.reweighing import bounds_of
from pipeline.core.run import Json, RunFiles
from pipeline.core.scoring.paired import Array, paired_mean

COLUMNS = (
    Column("bound", "train.likelihood_bound", 2, "train.likelihood_bound_stderr", if_null="-inf"),
    Column("ESS", "train.effective_sample_size", 2),
    Column("failed", "train.all_failed_share"),
    Column("dev EM", "dev.em"),
    Column("dev F1", "dev.f1"),
    Column("searches", "dev.searches", 2),
    Column("E-step", "phase_seconds.expectation", 0),
    Column("M-step", "phase_seconds.maximisation", 0),
)
LEGEND = (
    "bound: mean log p(answer) with its standard error; times in seconds; * best;\n"
    "failed: % of questions without a right trajectory"
)
DETAILS = (
    Column("bound +", "paired.likelihood_bound.difference", 2, "paired.likelihood_bound.stderr"),
    Column("median", "train.likelihood_bound_median", 2, if_null="-inf"),
    Column("trimmed", "train.likelihood_bound_trimmed", 2, if_null="-inf"),
    Column("mean p", "train.mean_likelihood", 3, "train.mean_likelihood_stderr"),
    Column("median p", "train.median_likelihood", 3),
    Column("ESS all", "train.global_effective_sample_size", 0),
    Column("of", "train.weighted_trajectories", 0),
)
DETAILS_TITLE = "answers of the training questions"
DETAILS_LEGEND = (
    "\nbound +: to the iteration before on the same questions, paired standard error;\n"
    "median, trimmed (without the highest and lowest tenth): of the bound;\n"
    "p: estimate of p(answer); ESS all: of all weighted trajectories together"
)
TESTS = ("base", "no_search", "one_search", "cold_start", "best")


def outcome_of(report: Json) -> Outcome:
    """ExSearch's report, ready to be shown."""
    row = report["cold_start"]
    name = "0, cold" if row is not None and "maximisation" in row["phase_seconds"] else "base"
    legend = LEGEND
    if report["iterations"] and report["best_iteration"] == 0:
        legend += "\nno iteration scored better on dev than what it started from, which stays the best"
    if report["iterations"]:
        is_recorded = any("mean_likelihood" in row["train"] for row in report["iterations"])
        legend += DETAILS_LEGEND + ("" if is_recorded else "\nmedian to ESS all: not recorded")
    legend += "".join(map(_of_dev, [*filter(None, [row]), *report["iterations"]]))
    legend += "".join(map(_of_proposal, report["iterations"]))
    legend += "".join(_of_engines(iteration) for iteration in report["iterations"][-1:])
    start = None if row is None else (name, row)
    return Outcome(report, COLUMNS, legend, start, TESTS, DETAILS, DETAILS_TITLE)


def _of_dev(row: Json) -> str:
    """The likelihood bound on dev, in words, where there is one."""
    if (found := row.get("dev_bound")) is None:
        return ""
    bound, change = found["likelihood_bound"], row["paired"]["dev_bound"]
    told = "-inf" if bound is None else f"{bound:.2f} \u00b1 {found['likelihood_bound_stderr']:.2f}"
    since = (
        ""
        if change is None
        else f", {change['difference']:+.2f} \u00b1 {change['stderr']:.2f} to the one before"
    )
    return f"\nbound on dev after iteration {row['iteration']}: {told}{since}"


def _of_proposal(row: Json) -> str:
    """What the correction of the proposal did in an E-step, in words."""
    ratio = row["train"].get("proposal_ratio")
    if ratio is None:
        return ""
    mean = "beyond all numbers" if ratio["mean"] is None else f"{ratio['mean']:.3g}"
    return (
        f"\nproposal of iteration {row['iteration']}: mean p/q {mean}, {ratio['mean_clipped']:.3g} where "
        f"{ratio['clipped_share']:.1f}% are clipped; {ratio['trajectories']} trajectories count as "
        f"{ratio['effective_sample_size']:.0f}"
    )


def _of_engines(row: Json) -> str:
    """Whether the engines had room for their agents in the E-step, in words."""
    use = row["train"].get("engines", {}).get(SEARCHER)
    if use is None:
        return ""
    return (
        f"\nlast E-step: {use['cache_hits']:.0f}% of prompt tokens were in the engines' cache, {use['preemptions']} "
        "preemptions"
    )


def em_report(run: RunFiles, config: Config) -> Json:
    """The report as far as the run has come. Scores are percentages, times seconds.

    `iterations` has the EM iterations (1, 2, ...); `cold_start` is iteration 0; `proposal` says whether trajectories
    were sampled from the model itself, from another distribution, or corrected for that.
    """
    rows = [row for t in range(config.em.iterations + 1) if (row := _em_row(run, t)) is not None]
    samples, dev = config.evaluation.bootstrap_samples, dev_scores(run, config.em)
    for row in rows:
        row["paired"] = _paired(run, config, row["iteration"], dev)
    return {
        **report_of(
            run, config.recipe, config.seed, config.em, rows, samples, start="cold_start", tests=TESTS
        ),
        "weighting": config.weighting.method,
        "proposal": _proposal(config),
    }


_EM_STEPS = {
    "expectation": ("cold_start", "sample"),
    "maximisation": (f"{SEARCHER}/train",),
    "evaluation": (EVALUATION,),
}
"""What the report calls the steps of an EM iteration."""


def _em_row(run: RunFiles, t: int) -> Json | None:
    """One iteration's figures, as soon as its first step is finished."""
    steps = run.steps(t)
    phases = {phase: steps[name] for phase, names in _EM_STEPS.items() for name in names if name in steps}
    if not phases:
        return None
    evaluation = phases.get("evaluation", {})
    return {
        "iteration": t,
        "phase_seconds": {name: result["seconds"] for name, result in phases.items()},
        "train": _without_times(phases.get("expectation", {})),
        "learner": _without_times(phases.get("maximisation", {})),
        "push": evaluation.get("push", {}).get(SEARCHER),
        "dev": evaluation.get("scores"),
        "dev_bound": _without_times(steps[DEV_BOUND]) if DEV_BOUND in steps else None,
    }


def _paired(run: RunFiles, config: Config, t: int, dev: Mapping[int, Scores]) -> Json:
    """What changed since the iteration before on the same questions; null where one of both is not recorded.

    The bound and the mean of p(y | x) on the training questions, as E-steps find them (the model of t - 1 against that
    of t - 2), and the dev scores of t against those of t - 1.
    """
    bounds = _both(run, config, t, "sample", "rollouts")
    changed = None
    if t in dev and t - 1 in dev and dev[t].asked == dev[t - 1].asked:
        changed = compare_metrics(
            dev[t - 1],
            dev[t].in_order_of(dev[t - 1]),
            config.evaluation.bootstrap_samples,
            config.seed,
            ("em", "f1"),
        )
    return {
        "likelihood_bound": _change(*bounds),
        "dev_bound": _change(*_both(run, config, t, DEV_BOUND, DEV_SAMPLES)),
        "mean_likelihood": _change(*(np.exp(values) for values in bounds)),
        "dev": changed,
    }


def _both(run: RunFiles, config: Config, t: int, step: str, folder: str) -> list[list[float]]:
    """The bounds of t - 1 and of t of the questions that both have sampled in a step."""
    before, after = (
        bounds_of(run, f"{number}/{step}", f"{number}/{folder}", config.weighting) if number >= 0 else {}
        for number in (t - 1, t)
    )
    shared = [id_ for id_ in after if id_ in before]
    return [[found[id_] for id_ in shared] for found in (before, after)]


def _change(before: Sequence[float] | Array, after: Sequence[float] | Array) -> Json | None:
    found = paired_mean(before, after)
    return None if found is None else asdict(found)


def _without_times(step: Json) -> Json:
    return {name: value for name, value in step.items() if name not in ("seconds", "seconds_waited")}


def _proposal(config: Config) -> str:
    rollout = config.rollout
    settings = f"temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, top_k {rollout.top_k}"
    if Sampling.of(rollout, 0).is_from_the_model:
        settings = "the model itself"
        if not config.em.hinted:
            return settings
    if config.em.hinted:
        settings += f", {config.em.hinted} of {rollout.samples} with a hint"
    how = "corrected by the clipped ratio p/q" if config.weighting.correct_proposal else "not corrected"
    return f"{settings}; {how}"
