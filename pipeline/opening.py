"""Opening a run: everything is checked before engines start."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from actors.planning import check_memory
from actors.reservation import plan
from actors.session import actor_logs, ray_session
from pipeline.core.config import Config
from pipeline.core.data.run_check import look_at_data
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.mirror.mirror import Mirror
from pipeline.core.packages import has_gpu_packages
from pipeline.core.policies import PolicySpec
from pipeline.core.preflight import check_run
from pipeline.core.retrieval import Servers, await_servers, prepare_index
from pipeline.core.run import ACTOR_LOGS, RunDirectory, RunFiles
from pipeline.core.tracking import Tracker
from pipeline.core.turns import TurnGrammar
from pipeline.run import Run
from retriever_service.index.store import read_manifest

logger = logging.getLogger(__name__)


@contextmanager
def open_run(
    config: Config, path: Path, display: Display, splits: Splits, policies: Sequence[PolicySpec]
) -> Iterator[Run]:
    """Everything is checked and Ray is up; engines and retriever start with the first step that is left.

    Raises:
        UserError: bad input, before anything expensive.
    """
    TurnGrammar(config.agent)  # whether its actions are there
    trained = [RunFiles(path).newest_version(spec.name) for spec in policies if spec.learner is not None]
    versions = config.of_recipe.iterations - min(trained, default=0)
    check_run(
        path,
        policies,
        config.storage,
        versions_to_come=versions,
        tokens=versions * _most_tokens(config, splits),
        device="gpu" if has_gpu_packages() else "cpu",
    )
    check_memory(config, policies)
    servers = await_servers(
        config.retriever,
        display,
        documents=config.agent.documents,
        timeout_s=config.cluster.start_timeout_s,
    )
    mirror = Mirror(path, config.storage.url, display.status) if config.storage.url is not None else None
    with (
        _opened(path, config, mirror) as files,
        mirror or nullcontext(),
        Tracker(files.path, config.tracking, files.path.name) as tracker,
        display.follow(files.path),
        ray_session(config.cluster, display.line),
    ):
        if (how_far := files.how_far(config.of_recipe.iterations)) is not None:
            display.line(how_far)
        if mirror is not None and mirror.restored is not None:
            logger.info(mirror.restored)
        logger.info(
            f"logs of the actors: {files.path / ACTOR_LOGS}; what they and libraries print: {actor_logs()}"
        )
        placement = plan(policies, config.cluster, config.retriever)
        if config.of_recipe.asynchronous and placement.take_turns:
            raise UserError(
                f"{config.section}.asynchronous: the learner is to train while engines sample, but they take turns on "
                "the same devices; set cluster.take_turns: false, if both fit there, or on GPUs cluster.colocate: no"
            )
        searched = servers or prepare_index(config.retriever, config.data, files.path / "index", display)
        files.keep_to(
            searched.fingerprint if isinstance(searched, Servers) else read_manifest(searched).fingerprint
        )
        look_at_data(files.path, config, splits, searched, display)
        run = Run(config, files, splits, searched, tracker, display, policies)
        with run:
            yield run


@contextmanager
def _opened(path: Path, config: Config, mirror: Mirror | None) -> Iterator[RunDirectory]:
    try:
        files = RunDirectory(path, config, fill=mirror.begin if mirror is not None else None)
    except BaseException:
        if mirror is not None:
            mirror.leave()
        raise
    with files:
        yield files


def _most_tokens(config: Config, splits: Splits) -> int:
    """In the trajectories of an iteration."""
    trained = config.of_recipe.sampled_questions(len(splits.train)) * config.most_samples
    return int(trained + len(splits.dev) * config.em.dev_samples) * config.model.max_length
