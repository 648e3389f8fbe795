"""One stream of metrics, written once to `metrics.jsonl` and mirrored to TensorBoard, W&B and MLflow.

Guarantees:

- `metrics.jsonl` is the truth: one complete JSON object per line, flushed when `log` returns. A last line
  that a kill cut off is dropped, with a warning, when the file is opened again.
- After `rollback` a phase that was cut off leaves no trace, so repeating it writes every metric once. The
  events for TensorBoard are rebuilt from the file at every start and show exactly what it holds.
- W&B and MLflow cannot forget: they continue the same run, and a repeated phase appears again.

One line (`phase` is a step of the run without its iteration; `step`, an optimiser step of it, is null for a metric of
the whole; `wall_s` counts the seconds that the run was up, over all its starts):

    {"time": "2026-03-01T12:00:00+00:00", "wall_s": 61.2, "iteration": 1, "phase": "searcher/train", "step": 3,
     "values": {"loss": 0.71}}
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any

from pipeline.core.config import TrackingConfig
from pipeline.core.errors import UserError
from pipeline.core.run import read_json, write_atomically
from retriever_service.files import json_object

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_RUN_IDS_FILE = "tracking.json"


class Tracker:
    """Writes the metrics of one run. Use as a context manager, or call `close`.

    Args:
        run_dir: the run's directory; metrics that are already there are continued.
        config: which mirrors to write.
        run_name: the name that W&B and MLflow show.

    Raises:
        UserError: a mirror's package is not installed, or `metrics.jsonl` is damaged before its last line.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, run_name: str) -> None:
        # Missing packages are found before anything is written.
        wandb = _require("wandb", "tracking.wandb_project") if config.wandb_project else None
        mlflow = _require("mlflow", "tracking.mlflow_experiment") if config.mlflow_experiment else None
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / METRICS_FILE
        records = _read_and_mend(self.path)
        self._wall_before = max((record["wall_s"] for record in records), default=0.0)
        self._opened = time.monotonic()
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", records) if config.tensorboard else None
        self._mirrors: list[_Wandb | _Mlflow] = []
        if wandb is not None:
            self._mirrors.append(_Wandb(wandb, run_dir, config, run_name))
        if mlflow is not None:
            self._mirrors.append(_Mlflow(mlflow, run_dir, config, run_name, records))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(
        self, values: Mapping[str, float], *, iteration: int, phase: str, step: int | None = None
    ) -> None:
        """Record metrics. A value that is not finite is written as null, with a warning."""
        for name in (name for name, value in values.items() if not math.isfinite(value)):
            logger.warning(
                f"metric {name} of iteration {iteration}, {phase}, is {values[name]}; recorded as null"
            )
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": round(self._wall_before + time.monotonic() - self._opened, 3),
            "iteration": iteration,
            "phase": phase,
            "step": step,
            "values": {name: float(v) if math.isfinite(v) else None for name, v in values.items()},
        }
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.log(record)
        for mirror in self._mirrors:
            mirror.log(record)

    def rollback(self, iteration: int, phase: str) -> int:
        """Forget what was logged in a phase that is about to be repeated.

        Returns:
            number of forgotten lines.
        """
        records = _read_and_mend(self.path)
        kept = [r for r in records if (r["iteration"], r["phase"]) != (iteration, phase)]
        if forgotten := len(records) - len(kept):
            self._file.close()
            write_atomically(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
            self._file = self.path.open("a", encoding="utf-8")
            if self._tensorboard is not None:
                self._tensorboard.rebuild(kept)
            logger.info(
                f"{forgotten} metrics of the unfinished phase {phase!r}, iteration {iteration}, forgotten"
            )
        return forgotten

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for mirror in self._mirrors:
            mirror.close()
        self._tensorboard, self._mirrors = None, []


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records, and the length in bytes of the complete lines."""
    complete = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:complete].splitlines(), start=1):
        try:
            records.append(_record(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is not a metric ({error!r:.200}); delete that line to go on"
            ) from error
    return records, complete


def _record(line: bytes) -> dict[str, Any]:
    record = json_object(line)
    datetime.fromisoformat(record["time"])
    wanted: dict[str, type | UnionType] = {
        "wall_s": int | float,
        "iteration": int,
        "phase": str,
        "step": int | None,
        "values": dict,
    }
    if odd := [key for key, kind in wanted.items() if not isinstance(record[key], kind)]:
        raise ValueError(f"{odd[0]} is {record[odd[0]]!r:.50}")
    if odd := [name for name, value in record["values"].items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{odd[0]} has no number")
    return record


def _read_and_mend(path: Path) -> list[dict[str, Any]]:
    """The records of a file; what stands behind the last line end was cut off by a kill and is removed."""
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it to go on without earlier metrics"
        ) from error
    records, complete = _parse(path, content)
    if complete < len(content):
        logger.warning(f"{path}: dropped an incomplete last line ({len(content) - complete} bytes)")
        os.truncate(path, complete)
    return records


def _named_values(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """("phase/name", value) of the finite values."""
    for name, value in record["values"].items():
        if value is not None:
            yield f"{record['phase']}/{name}", value


class _Axis:
    """Where a record stands on the horizontal axis of a plot over the whole run.

    A metric of a whole phase stands at its iteration; step metrics are counted on over the iterations.
    """

    def __init__(self) -> None:
        self._num_steps: Counter[str] = Counter()

    def position(self, record: Mapping[str, Any]) -> int:
        """Call once per record, in order."""
        if record["step"] is None:
            return int(record["iteration"])
        self._num_steps[record["phase"]] += 1
        return self._num_steps[record["phase"]] - 1


class _TensorBoard:
    """Events that repeat the records exactly, however often a run was resumed."""

    def __init__(self, directory: Path, records: list[dict[str, Any]]) -> None:
        self.directory = directory
        self._writer: Any = None
        self.rebuild(records)

    def rebuild(self, records: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self._writer = SummaryWriter(str(self.directory))
        self._axis = _Axis()
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        when, position = datetime.fromisoformat(record["time"]).timestamp(), self._axis.position(record)
        for tag, value in _named_values(record):
            self._writer.add_scalar(tag, value, position, walltime=when)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class _Wandb:
    def __init__(self, wandb: Any, run_dir: Path, config: TrackingConfig, run_name: str) -> None:
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_name,
            dir=str(run_dir),
            id=_stored_run_id(run_dir, "wandb"),
            resume="allow",
        )
        _store_run_id(run_dir, "wandb", self._run.id)

    def log(self, record: Mapping[str, Any]) -> None:
        position = {"iteration": record["iteration"], "step": record["step"], "wall_s": record["wall_s"]}
        self._run.log({**position, **dict(_named_values(record))})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(
        self,
        mlflow: Any,
        run_dir: Path,
        config: TrackingConfig,
        run_name: str,
        records: Sequence[Mapping[str, Any]],
    ) -> None:
        self._mlflow = mlflow
        mlflow.set_experiment(config.mlflow_experiment)
        run = mlflow.start_run(run_id=_stored_run_id(run_dir, "mlflow"), run_name=run_name)
        _store_run_id(run_dir, "mlflow", run.info.run_id)
        self._axis = _Axis()
        for record in records:
            self._axis.position(record)

    def log(self, record: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(dict(_named_values(record)), step=self._axis.position(record))

    def close(self) -> None:
        self._mlflow.end_run()


def _require(package: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key} is set, but the package {package} is not installed; "
            f"run pip install 'exsearch[{package}]' or remove the key"
        ) from error


def _run_ids(run_dir: Path) -> dict[str, str]:
    return read_json(run_dir / _RUN_IDS_FILE) or {}


def _stored_run_id(run_dir: Path, mirror: str) -> str | None:
    return _run_ids(run_dir).get(mirror)


def _store_run_id(run_dir: Path, mirror: str, run_id: str) -> None:
    """So that a resumed run continues the same run there."""
    write_atomically(run_dir / _RUN_IDS_FILE, json.dumps({**_run_ids(run_dir), mirror: run_id}) + "\n")
