"""A trained agent as a server, or as tools on standard input and output."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from actors.answering import AnsweringAgent
from pipeline.commands.ask import settings_of, what_to_search
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.policies import Snapshot
from pipeline.core.preflight import check_machine, check_models
from pipeline.core.run import RunFiles
from pipeline.core.turns import TurnGrammar
from pipeline.serve.app import serve as serve_http
from pipeline.serve.following import Following
from pipeline.serve.service import Service
from pipeline.serve.settings import ServeSettings
from pipeline.serve.tools import serve_stdio

logger = logging.getLogger(__name__)


def serve(
    model: str | None,
    follow: Path | None,
    index: Path | None,
    config: Config,
    settings: ServeSettings,
    *,
    as_tools: bool,
    display: Display,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        model: a model directory; None for the newest model of the run `follow`.
        index: None for the index of that run, or the retriever of the configuration.
        as_tools: on standard input and output, for one client (MCP), until it closes them.

    Raises:
        UserError, RetrieverError: no such model, action or index, no server that answers, or an address that cannot be
            listened on.
        RunError: the engine does not start, or was lost and cannot be started again.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for told_elsewhere in ("httpx", "mcp", "pipeline.core.display"):  # the latter prints its lines itself
        logging.getLogger(told_elsewhere).setLevel(logging.WARNING)
    following = None if follow is None else Following(follow)
    snapshot = _start(model, following)
    check_models([snapshot.model])
    TurnGrammar(config.agent)  # whether its actions are there
    if follow is not None and index is None and config.retriever.url is None:
        index = _index_of(follow, config)
    check_machine(starts_ray=True, on_gpus=has_gpu_packages())
    # Read by vLLM when it is imported. Its own lines are many, and go to standard output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    searched = what_to_search(index, config, display)
    rollout = config.rollout.with_one(concurrency=settings.max_conversations)
    agent = AnsweringAgent(config.model_copy(update={"rollout": rollout}), snapshot, searched)
    service = Service(settings, agent, None if following is None else following.newer)
    if as_tools:
        with asyncio.Runner() as runner:
            if not runner.run(serve_stdio(service)):
                logging.shutdown()
                os._exit(0)
        return
    serve_http(service, lambda url: display.line(f"serving {snapshot.model} at {url} (Ctrl-C to stop)"))


def config_of(model: str | None, follow: Path | None) -> Path | None:
    """How a model was trained to search (`settings_of`), or the run that is followed; None if nothing says it.

    Raises:
        UserError: neither is named or both are, there is no such run, or it is of an earlier version.
    """
    if follow is None:
        if model is None:
            raise UserError("name what answers: --model DIR, or --follow RUN for the newest model of a run")
        return settings_of(model)
    if model is not None:
        raise UserError("give --model or --follow, not both: a run that is followed has its own models")
    if not (follow / "config.yaml").is_file():
        raise UserError(f"{follow} is not a run directory: it has no config.yaml")
    RunFiles(follow).check_layout()
    return follow / "config.yaml"


def _start(model: str | None, following: Following | None) -> Snapshot:
    if following is not None:
        return following.newest()
    assert model is not None
    return Snapshot(0, model)


def _index_of(run: Path, config: Config) -> Path | None:
    """The index that a run has built for itself, unless its configuration names another."""
    own = run / "index"
    return own if config.retriever.index is None and own.is_dir() else None
