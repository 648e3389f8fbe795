"""A trained agent as a server, or as tools on standard input and output."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from pipeline.commands.answerer import agent_of, run_of
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.policies import Snapshot
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
    config = config.model_copy(
        update={"rollout": config.rollout.with_one(concurrency=settings.max_conversations)}
    )
    agent = agent_of(snapshot, follow or run_of(snapshot.model), index, config, display)
    service = Service(settings, agent, None if following is None else following.newer)
    if as_tools:
        with asyncio.Runner() as runner:
            if not runner.run(serve_stdio(service)):
                logging.shutdown()
                os._exit(0)
        return
    serve_http(service, lambda url: display.line(f"serving {snapshot.model} at {url} (Ctrl-C to stop)"))


def _start(model: str | None, following: Following | None) -> Snapshot:
    if following is not None:
        return following.newest()
    assert model is not None
    return Snapshot(0, model)
