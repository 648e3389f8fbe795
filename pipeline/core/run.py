"""The run directory: what is finished is there whole, what is not is not there.

    runs/NAME/
      config.yaml              the resolved configuration
      metrics.jsonl            every metric once
      run.log
      index/                   the retriever's index, unless `retriever.index` or `retriever.url` names one
      index.json               fingerprint of the index that is searched
      iterations/0000/         the warm-up; 0001... the EM iterations
        rollouts/  weighted/   Parquet shards of trajectories and of weighted examples
        learner/               DeepSpeed state of every rank (kept for the newest iteration only)
        model/                 a Hugging Face model directory
        expectation.json  maximisation.json  evaluation.json      one per finished phase, written behind its data
        DONE                   written last
      test/base.json ...       one per evaluation on the test questions
      report.json              one row per iteration

A phase is finished exactly when its JSON file exists. A killed run that is started again by the same command skips
finished phases and repeats the one that was cut off, with the same seeds.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.core.config import Config
from pipeline.core.errors import UserError

Json = dict[str, Any]

FREE_TO_CHANGE = ("cluster", "tracking", "rollout.workers", "rollout.concurrency", "rollout.timeout_s",
                  "rollout.max_restarts", "rollout.gpu_memory_utilization", "rollout.kv_cache_gib",
                  "rollout.tensor_parallel_size", "rollout.enforce_eager", "retriever.url", "retriever.replicas",
                  "retriever.device", "retriever.gpus_per_replica", "retriever.max_batch", "retriever.timeout_s",
                  "retriever.max_attempts", "retriever.max_failure_share", "em.iterations", "em.patience",
                  "learner.threads_per_rank", "learner.start_timeout_s")  # fmt: skip
"""Keys that say where and how long a run goes, not what it computes: a resumed run may have others."""


_LOCK_FILE = "lock"
_PATH_KEYS = (("data", "root"), ("model", "path"), ("retriever", "index"), ("warmup", "trajectories"))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a kill, never meets half of it."""
    with _whole_or_absent(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON: a number that is not finite becomes null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    with _whole_or_absent(path) as file:
        pq.write_table(table, file)


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete and on the disk; a failure leaves nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFiles:
    """Reads the directory of a run, whoever may be writing it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def iteration(self, number: int) -> Path:
        return self.path / "iterations" / f"{number:04d}"

    def model(self, number: int) -> Path:
        return self.iteration(number) / "model"

    def learner(self, number: int) -> Path:
        return self.iteration(number) / "learner"

    def finished(self, number: int, phase: str) -> Json | None:
        """What the phase left behind, or None if it is not finished."""
        return _read_json(self.iteration(number) / f"{phase}.json")

    def test_results(self) -> dict[str, Json]:
        found = {path.stem: _read_json(path) for path in sorted((self.path / "test").glob("*.json"))}
        return {name: result for name, result in found.items() if result is not None}


class RunDirectory(RunFiles):
    """Opens or creates the directory of one run, for one process.

    Raises:
        UserError: it holds something else, a run with a configuration that computes something else, or a run that
            another process is working on.
    """

    def __init__(self, path: Path, config: Config) -> None:
        super().__init__(path)
        stored = self.path / "config.yaml"
        if stored.exists():
            self._check_same(stored, config)
        elif path.exists() and not _is_empty(path):
            raise UserError(
                f"{path} is not empty and holds no run (no config.yaml); choose another --run directory"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / _LOCK_FILE)
        write_atomically(stored, yaml.safe_dump(_with_absolute_paths(config), sort_keys=False))

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def keep_to(self, fingerprint: str) -> None:
        """Note which index is searched.

        Raises:
            UserError: the results of this run come from searches in another one.
        """
        path = self.path / "index.json"
        before = (_read_json(path) or {}).get("fingerprint", fingerprint)
        if before != fingerprint and _has_results(self.path):
            raise UserError(
                f"{self.path} holds a run that searched another index ({before}) than there is now ({fingerprint}); "
                "going on with this one would mix two experiments. Give it the old index, or another --run directory."
            )
        write_json(path, {"fingerprint": fingerprint})

    def phase(self, number: int, phase: str, work: Callable[[], Json]) -> Json:
        """The phase's result: read if it is finished, computed by `work` and then written otherwise."""
        return self._once(self.iteration(number) / f"{phase}.json", work)

    def test(self, name: str, version: int, work: Callable[[], Json]) -> Json:
        """Like `phase`, for one evaluation on the test questions; done again if another version is to be evaluated."""
        path = self.path / "test" / f"{name}.json"
        if (_read_json(path) or {}).get("iteration") != version:
            path.unlink(missing_ok=True)
        return self._once(path, work)

    def close_iteration(self, number: int) -> None:
        """Mark an iteration as whole and drop the learner state of the one before it."""
        write_atomically(self.iteration(number) / "DONE", "")
        if number > 0:
            shutil.rmtree(self.learner(number - 1), ignore_errors=True)

    def fresh(self, path: Path) -> Path:
        """An empty directory: what an interrupted phase left there is removed."""
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def _once(self, path: Path, work: Callable[[], Json]) -> Json:
        done = _read_json(path)
        if done is not None:
            return done
        start = time.perf_counter()
        result = work() | {"seconds": round(time.perf_counter() - start, 3)}
        write_json(path, result)
        return _read_json(path) or {}

    @staticmethod
    def _check_same(stored: Path, config: Config) -> None:
        try:
            old = Config.model_validate(yaml.safe_load(stored.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{stored} cannot be read ({error}); choose another --run directory") from error
        before, now = flatten(_with_absolute_paths(old)), flatten(_with_absolute_paths(config))
        changed = [
            key for key in now | before if before.get(key) != now.get(key) and not _is_free_to_change(key)
        ]
        # A run that stopped before its first result, say over a bad corpus, may go on with another configuration.
        if changed and _has_results(stored.parent):
            lines = "\n".join(f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
            raise UserError(
                f"{stored.parent} holds a run with another configuration; going on with this one would mix two "
                f"experiments:\n{lines}\nGive the old values, or another --run directory."
            )


def _is_empty(directory: Path) -> bool:
    """True also if all there is is what a kill left of the very first write."""
    return directory.is_dir() and all(
        path.suffix == ".tmp" or path.name == _LOCK_FILE for path in directory.iterdir()
    )


def _has_results(run: Path) -> bool:
    return any(run.glob("iterations/*/*.json")) or any(run.glob("test/*.json"))


def _is_free_to_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _with_absolute_paths(config: Config) -> Json:
    """The configuration as it holds in any working directory; a hub name, or what is not there, stays as it is."""
    tree = config.model_dump(mode="json")
    for section, key in _PATH_KEYS:
        value = tree[section][key]
        if isinstance(value, str) and Path(value).exists():
            tree[section][key] = str(Path(value).resolve())
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _lock(path: Path) -> IO[str]:
    """An exclusive lock that ends with this process, however it ends."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another process is working on {path.parent}; wait for it or choose another --run"
        ) from error
    return file


def _read_json(path: Path) -> Json | None:
    if not path.exists():
        return None
    value: Json = json.loads(path.read_text(encoding="utf-8"))
    return value
