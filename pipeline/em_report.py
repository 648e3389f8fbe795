"""ExSearch's report: the iterations as those of generalised EM. docs/formats.md describes it field by field."""

from __future__ import annotations

from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config
from pipeline.core.report import EVALUATION, Column, Outcome, report_of
from pipeline.core.run import Json, RunFiles

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
TESTS = ("base", "no_search", "one_search", "cold_start", "best")


def outcome_of(report: Json) -> Outcome:
    """ExSearch's report, ready to be shown."""
    row = report["cold_start"]
    name = "0, cold" if row is not None and "maximisation" in row["phase_seconds"] else "base"
    legend = LEGEND
    if report["iterations"] and report["best_iteration"] == 0:
        legend += "\nno iteration scored better on dev than what it started from, which stays the best"
    legend += "".join(_of_engines(iteration) for iteration in report["iterations"][-1:])
    return Outcome(report, COLUMNS, legend, None if row is None else (name, row), TESTS)


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
    return {
        **report_of(run, config.recipe, config.seed, config.em, rows, start="cold_start"),
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
    }


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
