"""A trained agent, made ready to answer: what `exsearch ask` and `exsearch serve` begin with."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from actors.answering import AnsweringAgent
from pipeline.core.agent_settings import settings_beside
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.policies import Snapshot
from pipeline.core.preflight import check_machine, check_models
from pipeline.core.report import best_iteration, models_of
from pipeline.core.retrieval import Searched, Servers, await_servers, searchable
from pipeline.core.run import RunFiles
from pipeline.core.turns import TurnGrammar


def agent_of(
    snapshot: Snapshot, run: Path | None, index: Path | None, config: Config, display: Display
) -> AnsweringAgent:
    """The agent, not started yet; all that can be wrong beforehand has been looked at.

    Args:
        run: what the model belongs to, if anything: its index is searched where nothing else is named.
        index: None for the retriever of the configuration, or the run's index.

    Raises:
        UserError, RetrieverError: no such model, action or index, no server that answers, or a machine that is not fit.
    """
    check_models([snapshot.model])
    TurnGrammar(config.agent)  # whether its actions are there
    check_machine(starts_ray=True, on_gpus=has_gpu_packages())
    # Read by vLLM when it is imported. Its own lines are many, its warnings of our settings, and go to standard output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else where the memory lies, of every start
    # Nothing to those who ask: what its libraries will change one day, here and in the engine's process, and that this
    # one is killed in the end, with a semaphore that is then cleared away.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore:resource_tracker:UserWarning")
    return AnsweringAgent(config, snapshot, _what_to_search(run, index, config, display))


def _what_to_search(run: Path | None, index: Path | None, config: Config, display: Display) -> Searched:
    """An index, or the retriever of the configuration, once it is known to answer.

    Raises:
        UserError, RetrieverError: both are named, or neither is; no such index, or no server that answers.
    """
    retriever = config.retriever
    if index is not None and retriever.url is not None:
        raise UserError(
            f"there are --index {index} and retriever.url ({', '.join(retriever.url)}); leave one out "
            "(retriever.url=null)"
        )
    servers = await_servers(
        retriever, display, documents=config.agent.documents, timeout_s=config.cluster.start_timeout_s
    )
    if isinstance(servers, Servers):
        return servers
    searched = index or retriever.index
    if searched is None and run is not None and (run / "index").is_dir():
        searched = run / "index"
    if searched is None:
        raise UserError("there is nothing to search: give --index DIR, or --url ADDRESS of a server")
    searchable(retriever, Path(searched))
    return Path(searched)


def run_of(model: str) -> Path | None:
    """The run that a model directory (RUN/iterations/N/POLICY/model) belongs to."""
    run = next(
        (parent.parent for parent in Path(model).resolve().parents if parent.name == "iterations"), None
    )
    return run if run is not None and (run / "config.yaml").is_file() else None


def settings_of(model: str | None, run: Path | None, option: str = "--run") -> Path | None:
    """How what answers was trained to search: the configuration of its run, or else `agent.json` beside the model; None
    if neither is there.

    Args:
        run: in place of a model.
        option: that names it.

    Raises:
        UserError: neither is named or both are, there is no such run, it is of an earlier version, or
            `settings_beside`.
    """
    if model is None and run is None:
        raise UserError(f"name what answers: --model DIR, or {option} RUN for a model of a run")
    if model is not None and run is not None:
        raise UserError(f"give --model or {option}, not both: a run has its own models")
    if model is not None and (run := run_of(model)) is None:
        return settings_beside(model)
    assert run is not None
    RunFiles(run).check_is_run()
    return run / "config.yaml"


def settings_line(model: str, settings: list[Path] | Path | None) -> str:
    """For people, what an agent searches by."""
    if settings is None:
        return (
            f"{model} has no agent.json, and belongs to no run: it is asked with the default settings of the agent. If "
            "it was trained with others, name them (--config FILE)"
        )
    named = settings if isinstance(settings, list) else [settings]
    return f"settings of the agent: {', '.join(map(str, named))}"


def best_model(run: Path, config: Config) -> str:
    """The searcher at the run's best iteration; what the run starts from where that is best.

    Raises:
        UserError: the run trains other models than a searcher, or has trained none yet.
    """
    files = RunFiles(run)
    if not files.trained():
        raise UserError(
            f"{run} has trained no model yet; go on with it, or name what it starts from: --model {config.model.path}"
        )
    found = models_of(files, best_iteration(files, config.of_recipe))
    if found and SEARCHER not in found:
        raise UserError(
            f"{run} has trained {' and '.join(found)}, and no searcher that could be asked; exsearch evaluate --run "
            f"{run} scores how they answer together"
        )
    return str(found.get(SEARCHER, config.model.path))
