"""Score one model on one split, each question file for itself and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from actors.cluster import Cluster
from actors.session import ray_session
from pipeline.commands.predictions import protocol_scores
from pipeline.core.agents.program import Answering
from pipeline.core.config import Config
from pipeline.core.config.loading import Files
from pipeline.core.data.questions import read_questions, sample_questions
from pipeline.core.data.run_check import look_at_corpus
from pipeline.core.data.split_names import SPLITS
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.evaluation import evaluate
from pipeline.core.policies import PolicySpec
from pipeline.core.preflight import check_models
from pipeline.core.question_scores import scored_table
from pipeline.core.records import Question, Trajectory
from pipeline.core.report import best_iteration, models_of
from pipeline.core.retrieval import Searched, what_is_searched
from pipeline.core.run import Json, RunFiles, write_json, write_records
from pipeline.core.scoring.files import suffix_of, write_predictions
from pipeline.core.scoring.support import predict
from pipeline.core.turns import TurnGrammar
from pipeline.methods import answering, load, searching


def evaluate_model(
    config_files: Files,
    overrides: Sequence[str],
    *,
    run: Path | None,
    model: str | None,
    split: str,
    out: Path | None,
    display: Display,
) -> Json:
    """Greedy evaluation of a run's best iteration, of what a configuration starts from, or of one model as a searcher.

    With `out` the scores are written there, and beside them the trajectories and the predictions.

    Returns:
        `{"models": {role: model}, "split", "sets": {file: scores}, "all": scores, "protocol": its own scores of all,
        "coverage": of "all" and each file}`.

    Raises:
        UserError: nothing to evaluate, no such split, nothing to search, or bad input.
    """
    if run is not None:
        if config_files:
            raise UserError("give --run or --config, not both: a run has its own configuration")
        RunFiles(run).check_is_run()
        config_files = run / "config.yaml"
    config = load(config_files, overrides)
    agent = answering(config) if model is None else searching(config.agent, model)
    models = dict(agent.models)
    if run is not None and model is None:
        models = _best_models(run, config, agent, display)
    check_models(models.values())
    TurnGrammar(config.agent)  # whether its actions are there
    if out is not None and out.suffix != ".json":
        raise UserError(
            f"--out is {out}; give a name that ends in .json (trajectories and predictions go beside it)"
        )
    if split not in SPLITS:
        raise UserError(f"--split is {split}; choose train, dev or test")
    sets = _read_sets(config, split, display)
    if run is None and config.retriever.index is None and config.retriever.url is None:
        raise UserError(
            "evaluation needs something to search: give --run, or retriever.index=DIR (see exsearch index build), or "
            "retriever.url=ADDRESS of a server"
        )
    searched = what_is_searched(
        config.retriever,
        config.data,
        (run or Path()) / "index",
        display,
        documents=config.agent.documents,
        timeout_s=config.cluster.start_timeout_s,
    )
    together = {"all": [question for members in sets.values() for question in members]}
    coverage = look_at_corpus({**sets, **together}, searched, display).get("coverage", {})
    trajectories = _trajectories(config, agent, models, sets, searched, split, display)
    return scored(config, models, split, sets, trajectories, coverage, out, display)


def _trajectories(
    config: Config,
    agent: Answering,
    models: Mapping[str, str],
    sets: Mapping[str, Sequence[Question]],
    searched: Searched,
    split: str,
    display: Display,
) -> list[Trajectory]:
    """The answering turn of one greedy episode per question."""
    # The evidence is for scoring alone, and may be many times what is asked.
    questions = [replace(question, evidence=None) for members in sets.values() for question in members]
    policies = [PolicySpec(role, config.model.at(path), config.rollout) for role, path in models.items()]
    with ray_session(config.cluster, display.line):
        with display.status("starting the retriever and the vLLM engines"):
            cluster = Cluster(policies, config.cluster, config.retriever, searched)
        with cluster, display.progress(f"evaluating on {split}", len(questions), "questions") as advance:
            episodes = cluster.greedy(
                agent.program,
                questions,
                {role: cluster.policy(role) for role in models},
                on_progress=lambda done: advance.to(done, len(questions)),
            )
    return [episode.turn(agent.answers) for episode in episodes]


def scored(
    config: Config,
    models: Mapping[str, str],
    split: str,
    sets: Mapping[str, Sequence[Question]],
    trajectories: Sequence[Trajectory],
    coverage: Json,
    out: Path | None,
    display: Display,
) -> Json:
    """Scores of one trajectory per question, as `evaluate_model` gives and writes them."""
    found = {trajectory.question_id: trajectory for trajectory in trajectories}
    questions = [question for members in sets.values() for question in members]
    predictions = {question.id: predict(question, found[question.id]) for question in questions}
    rules = config.evaluation

    def score(members: Sequence[Question]) -> Json:
        own = [found[question.id] for question in members]
        return evaluate(members, own, rules.bootstrap_samples, config.seed, rules.protocol)

    result = {
        "models": dict(models),
        "split": split,
        "sets": {name: score(members) for name, members in sets.items()},
        "all": score(questions),
        "protocol": protocol_scores(config, questions, predictions, display),
        "coverage": coverage,
    }
    if out is not None:
        write_json(out, result)
        write_records(out.with_suffix(".parquet"), scored_table(questions, trajectories, rules.protocol))
        own_format = out.with_name(f"{out.stem}.predictions{suffix_of(rules.protocol)}")
        write_predictions(rules.protocol, own_format, questions, predictions)
    return result


def _best_models(run: Path, config: Config, agent: Answering, display: Display) -> dict[str, str]:
    """The model of each role at the run's best iteration; what it starts from where the run has not trained it.

    Raises:
        UserError: the run has trained models, and none of them answers.
    """
    files = RunFiles(run)
    trained = models_of(files, best_iteration(files, config.of_recipe))
    if trained and not trained.keys() & agent.models.keys():
        raise UserError(
            f"{run} has trained {' and '.join(trained)}, and its recipe does not say how they answer; the "
            "scores are in its report.json. Name a model with --model to see it search by itself"
        )
    if not trained and (others := files.trained()):
        display.line(
            f"no iteration of {run} scored better on dev than what it started from, which is scored; for another one: "
            f"--model {run}/iterations/0001/{next(iter(others))}/model"
        )
    return {role: str(trained.get(role, start)) for role, start in agent.models.items()}


def _read_sets(config: Config, split: str, display: Display) -> dict[str, list[Question]]:
    """Questions per file, sampled as a whole as the run does."""
    paths: Sequence[str] = getattr(config.data, split)
    if not paths:
        raise UserError(f"data.{split} is empty; name question files, or choose another --split")
    limit = getattr(config.data, f"{split}_limit")
    everything = read_questions(paths, root=config.data.root, hops=config.data.hops_of(split))
    seed = config.data.sample_seed(config.seed)
    chosen = everything if limit is None else sample_questions(everything, limit, seed)
    if len(chosen) < len(everything):
        display.line(
            f"{len(chosen)} of {len(everything)} questions: a sample, as data.{split}_limit says "
            f"(data.{split}_limit=null for all)"
        )
    wanted = {question.id: question for question in chosen}
    sets = {
        path: [q for q in read_questions([path], root=config.data.root, with_evidence=True) if q.id in wanted]
        for path in paths
    }
    return {path: members for path, members in sets.items() if members}
