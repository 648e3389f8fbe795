"""The run directory: what is finished is there whole, what is not is not there.

    runs/NAME/
      config.yaml              the resolved configuration
      metrics.jsonl            every metric once
      run.log
      index/                   the retriever's index, unless `retriever.index` or `retriever.url` names one
      index.json               fingerprint of the index that is searched
      data.json                leaks, doubles and evidence coverage of the data
      iterations/0000/         the cold start; 0001... the iterations
        rollouts/              Parquet shards of trajectories, beside each a side-car (_000000.json); see `core.shards`
        POLICY/                one folder per policy: `searcher` in ExSearch
          examples/            Parquet shards of training examples
          learner/             checkpoint of the learner (kept of the newest version only); without train.json it is
                               one from the middle of a training, and no version
          model/               a Hugging Face model directory
          train.json
        sample.json  evaluation.json  ...      one per finished step, written behind its data
        DONE                   written last
      test/base.json ...       one per evaluation on the test questions
      report.json              one row per iteration

A step ("3/searcher/train", "test/base") is finished exactly when its JSON file exists. A killed run that is started
again by the same command skips finished steps and repeats the one that was cut off, with the same seeds; a sampling
keeps its complete shards, and a training goes on behind its last checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel

from pipeline.core.config import EXSEARCH, Config, OnDisk
from pipeline.core.config.loading import check_keys, read_tree
from pipeline.core.errors import UserError
from retriever_service import files

Json = dict[str, Any]
logger = logging.getLogger(__name__)

FREE_TO_CHANGE = ("cluster", "storage", "tracking", "rollout.workers", "rollout.concurrency", "rollout.timeout_s",
                  "rollout.max_restarts", "rollout.min_workers", "rollout.max_workers",
                  "rollout.gpu_memory_utilization", "rollout.kv_cache_gib", "rollout.tensor_parallel_size",
                  "rollout.enforce_eager", "retriever.url",
                  "retriever.replicas", "retriever.threads_per_replica", "retriever.local_copy",
                  "retriever.device", "retriever.gpus_per_replica", "retriever.max_batch", "retriever.batch_wait_s",
                  "retriever.timeout_s",
                  "retriever.max_attempts", "rollout.max_failure_share", "em.iterations", "em.patience",
                  "learner.num_ranks", "learner.zero_stage", "learner.offload_optimizer", "learner.offload_parameters",
                  "learner.tokens_per_microbatch", "learner.gradient_checkpointing",
                  "learner.threads_per_rank", "learner.start_timeout_s", "learner.checkpoint_minutes",
                  "learner.max_skipped_steps", "learner.stall_timeout_s")  # fmt: skip
"""Keys that say where and how long a run goes, not what it computes: a resumed run may have others. So do a recipe's
own `iterations` and `patience`."""


ACTOR_LOGS = "logs"
"""Of the actors' logs. Nothing that a run goes on from is there."""
PROFILE_FILE = "profile.json"
"""Of `actors.timeline`: a timeline of one iteration."""
DATA_FILE = "data.json"
"""Of `core.data.run_check`: what was found in questions and corpus before the first step."""
MIRROR_FILE = "mirror.json"
"""Of `core.mirror`: where the copy of the directory is, and how it stands."""
ROWS_PER_GROUP = 256
"""Of trajectories and examples: what is read at least, where one of them is looked at. Smaller groups make shards
larger, and slower to read whole."""
_LOCK_FILE = "lock"
_LOCK_WAIT_S = 1.0
"""A look at the lock (`is_worked_on`) holds it for an instant."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a kill, never meets half of it."""
    with _whole_or_absent(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON: a number that is not finite becomes null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def finite(value: Any) -> Any:
    """As it stands in strict JSON: null for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(
    path: Path,
    table: pa.Table,
    compression: Literal["snappy", "zstd"] = "snappy",
    rows_per_group: int | None = None,
) -> None:
    """Write a Parquet file whole or not at all."""
    with _whole_or_absent(path) as file:
        pq.write_table(table, file, compression=compression, row_group_size=rows_per_group)


def write_records(path: Path, table: pa.Table) -> None:
    """Write a table of trajectories or examples, of which some can be read without the others."""
    write_table(path, table, rows_per_group=ROWS_PER_GROUP)


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path) as file:
        yield file


class RunFiles:
    """Reads the directory of a run, whoever may be writing it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def at(self, step: str) -> Path:
        """Where a step's data are: "3/selector/model" is iterations/0003/selector/model, "test/best" is test/best."""
        head, _, rest = step.partition("/")
        return self.iteration(int(head)) / rest if head.isdecimal() else self.path / step

    def iteration(self, number: int) -> Path:
        return self.path / "iterations" / f"{number:04d}"

    def finished(self, step: str) -> Json | None:
        """What a step left behind, or None if it is not finished."""
        return read_json(self.at(f"{step}.json"))

    def finished_iterations(self) -> int:
        """How many are whole."""
        return len(list(self.path.glob("iterations/*/DONE")))

    def how_far(self, iterations: int) -> str | None:
        """For a person, where a process that goes on with this run begins; None if there is nothing to go on with."""
        if not _has_results(self.path):
            return None
        return (
            f"going on with {self.path}: {self.finished_iterations()} of {iterations} iterations are finished"
        )

    def trained(self) -> list[str]:
        """The policies that this run has trained."""
        return sorted({path.parts[-2] for path in self.path.glob("iterations/*/*/train.json")})

    def steps(self, number: int) -> dict[str, Json]:
        """All finished steps of an iteration, under their names: "sample", "selector/train", ..."""
        directory = self.iteration(number)
        paths = sorted([*directory.glob("*.json"), *directory.glob("*/*.json")])
        return {
            str(path.relative_to(directory).with_suffix("")): result
            for path in paths
            if not path.name.startswith("_") and (result := read_json(path)) is not None
        }

    def versions(self, policy: str) -> list[int]:
        """The versions of a policy that this run has trained."""
        return sorted(int(path.parts[-3]) for path in self.path.glob(f"iterations/*/{policy}/train.json"))

    def newest_version(self, policy: str, up_to: int | None = None) -> int:
        """The newest version of a policy, or the newest up to one, that this run trained; -1 if there is none."""
        made = self.versions(policy)
        return max((version for version in made if up_to is None or version <= up_to), default=-1)

    def removed_models(self) -> dict[str, list[int]]:
        """By policy, the versions whose exported model is not there any more (`storage.keep_last`)."""
        return {
            policy: gone
            for policy in self.trained()
            if (gone := [v for v in self.versions(policy) if not self.at(f"{v}/{policy}/model").is_dir()])
        }

    def check_is_run(self) -> None:
        """
        Raises:
            UserError: no run is there, or one of an earlier version.
        """
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path} is not a run directory: it has no config.yaml")
        self.check_layout()

    def check_layout(self) -> None:
        """Refuse a directory that an earlier version laid out, without folders for policies.

        Raises:
            UserError: it is one.
        """
        names = ("model", "learner", "weighted", "expectation.json", "maximisation.json")
        if found := next((p for name in names for p in self.path.glob(f"iterations/*/{name}")), None):
            raise UserError(
                f"{self.path} holds a run of an earlier version, which had its files elsewhere ({found}); choose "
                "another --run directory, or use that version"
            )

    def test_results(self) -> dict[str, Json]:
        found = {path.stem: read_json(path) for path in sorted((self.path / "test").glob("*.json"))}
        return {name: result for name, result in found.items() if result is not None}


class RunDirectory(RunFiles):
    """Opens or creates the directory of one run, for one process.

    Args:
        fill: called under the lock: it may restore a run into an empty directory.

    Raises:
        UserError: it holds something else, a run with a configuration that computes something else, or a run that
            another process is working on.
    """

    def __init__(self, path: Path, config: Config, fill: Callable[[], None] | None = None) -> None:
        super().__init__(path)
        stored = self.path / "config.yaml"
        had_run = stored.exists()
        check_directory(path, config)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / _LOCK_FILE)
        try:
            if fill is not None:
                fill()
            if not had_run and stored.exists():
                check_directory(path, config)
            write_atomically(stored, yaml.safe_dump(_with_absolute_paths(config), sort_keys=False))
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def keep_to(self, fingerprint: str, what: str = "index") -> None:
        """Note which index is searched, or what else a run is of, in a file of its name.

        Raises:
            UserError: the results of this run are of another one.
        """
        path = self.path / f"{what}.json"
        before = (read_json(path) or {}).get("fingerprint", fingerprint)
        if before != fingerprint and _has_results(self.path):
            raise UserError(
                f"{self.path} holds a run that searched another {what} ({before}) than there is now ({fingerprint}); "
                f"going on with this one would mix two experiments. Give it the old {what}, or another --run directory."
            )
        write_json(path, {"fingerprint": fingerprint})

    def once(self, step: str, work: Callable[[], Json]) -> Json:
        """The step's result: read if it is finished, computed by `work` and then written otherwise."""
        if (finished := self.finished(step)) is not None:
            return finished
        start = time.perf_counter()
        result = work()
        return self.record(step, result, time.perf_counter() - start)

    def record(self, step: str, result: Json, seconds: float) -> Json:
        """A step is finished, which took so long; its result as `finished` gives it."""
        write_json(self.at(f"{step}.json"), {**result, "seconds": round(seconds, 3)})
        return self.finished(step) or {}

    def forget(self, step: str) -> None:
        """Have a step done again, say because another version is to be looked at."""
        self.at(f"{step}.json").unlink(missing_ok=True)

    def close_iteration(self, number: int) -> None:
        """Mark an iteration as whole."""
        write_atomically(self.iteration(number) / "DONE", "")

    def fresh(self, step: str) -> Path:
        """`at(step)` as an empty directory: what an interrupted step left there is removed."""
        path = self.at(step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def check_directory(path: Path, config: Config) -> None:
    """What `RunDirectory` refuses before it asks whether another process works there.

    Raises:
        UserError: the directory holds something else, or a run with a configuration that computes something else.
    """
    if (stored := path / "config.yaml").exists():
        RunFiles(path).check_layout()
        _check_same(stored, config)
    elif path.exists() and not _is_empty(path):
        raise UserError(
            f"{path} is not empty and holds no run (no config.yaml); choose another --run directory"
        )


def holds_same(path: Path, config: Config) -> bool:
    """Whether a directory holds a run of exactly this configuration, paths compared as places."""
    try:
        old = type(config).model_validate(read_tree(path / "config.yaml"))
    except (UserError, ValueError):  # another recipe's, another version's, or no run at all
        return False
    return _with_absolute_paths(old) == _with_absolute_paths(config)


def _check_same(stored: Path, config: Config) -> None:
    try:
        tree = read_tree(stored)
    except UserError as error:
        raise UserError(f"{error}; choose another --run directory") from error
    try:
        if (recipe := tree.get("recipe", EXSEARCH)) != config.recipe:
            raise UserError(
                f"{stored.parent} holds a run of the recipe {recipe}, not {config.recipe}; choose another --run "
                "directory"
            )
        check_keys(tree, type(config))
        old = type(config).model_validate(tree)
    except UserError as error:
        raise UserError(f"{stored}: {error}") from error
    except ValueError as error:
        raise UserError(f"{stored} cannot be read ({error}); choose another --run directory") from error
    before, now = flatten(_with_absolute_paths(old)), flatten(_with_absolute_paths(config))
    free = [*FREE_TO_CHANGE, f"{config.recipe}.iterations", f"{config.recipe}.patience"]
    if not old.starts_from_data_root and not config.starts_from_data_root:
        free.append("data.root")
    changed = [key for key in now | before if before.get(key) != now.get(key) and not _is_in(key, free)]
    # A run that stopped before its first result, say over a bad corpus, may go on with another configuration.
    if changed and _has_results(stored.parent):
        lines = "\n".join(f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise UserError(
            f"{stored.parent} holds a run with another configuration; going on with this one would mix two "
            f"experiments:\n{lines}\nGive the old values, or another --run directory."
        )


def _is_empty(directory: Path) -> bool:
    """True also if all there is is what a kill left of the very first write, or of a run that was being restored."""
    return directory.is_dir() and (
        (directory / MIRROR_FILE).exists()
        or all(path.suffix == ".tmp" or path.name == _LOCK_FILE for path in directory.iterdir())
    )


def _has_results(run: Path) -> bool:
    """What a phase that goes on has written counts as well: complete shards, and tasks of others (`core.shards`)."""
    of_phases = [
        f"{steps}/**/{name}" for steps in ("iterations", "test") for name in ("_*.json", "_loose/*/*.json")
    ]
    return any(any(run.glob(pattern)) for pattern in ("iterations/*/*.json", "test/*.json", *of_phases))


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def what_it_computes(config: Config) -> Json:
    """What the results of a run follow from, under dotted keys, alike on every machine: without the keys that are free
    to change, but with the number of iterations; of what lies on a disk the last part of its path."""
    return what_computes(_with_paths(config, lambda path: Path(path).name), config.section)


def what_computes(tree: Mapping[str, Any], section: str) -> Json:
    """The same of a configuration as it is stored, paths included: also of another version. `section`: its recipe's."""
    iterations = f"{section}.iterations"
    return {k: v for k, v in flatten(tree).items() if k == iterations or not _is_in(k, FREE_TO_CHANGE)}


def _with_absolute_paths(section: BaseModel) -> Json:
    """A section as it holds in any working directory; a hub name, or what is not there, stays as it is."""
    return _with_paths(section, lambda path: str(Path(path).resolve()) if Path(path).exists() else path)


def _with_paths(section: BaseModel, change: Callable[[str], str]) -> Json:
    """A section with each of its paths changed."""
    tree = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            tree[key] = _with_paths(value, change)
        elif isinstance(value, str) and OnDisk() in field.metadata:
            tree[key] = change(value)
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
    file = path.open("a+")
    deadline = time.monotonic() + _LOCK_WAIT_S
    while not _try_lock(file):
        if time.monotonic() >= deadline:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{holder} is working on {path.parent}; wait for it or choose another --run")
        time.sleep(0.05)
    with suppress(OSError):  # a full disk is told of by whoever has to write
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            f"{file.name}: the file system has no locks ({error.strerror}); see to it that no second process uses this "
            "run directory"
        )
    return True


def is_worked_on(run: Path) -> bool | None:
    """Whether a process has the run directory open; None where the file system has no locks to tell by."""
    try:
        with (run / _LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return False


def read_json(path: Path) -> Json | None:
    """What `write_json` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return files.json_object(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error!s:.200}); copy it back from where it is whole, or remove it: the same command "
            "makes it again"
        ) from error
