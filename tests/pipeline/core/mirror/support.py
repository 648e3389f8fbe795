"""A process with a run and its copy, and what it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from actors.learner_files import replace_directory
from pipeline.core.config import Config, StorageConfig
from pipeline.core.mirror.manifest import read_manifest
from pipeline.core.mirror.mirror import Mirror
from pipeline.core.mirror.store import Store
from pipeline.core.run import RunDirectory, write_atomically, write_json

LARGE = bytes(range(256)) * 8192
"""More than is read at once."""
NOT_COPIED = {"lock", "mirror.json"}


def config(url: str) -> Config:
    return Config(storage=StorageConfig(url=url))


class Process:
    """One start of a command on a run directory; `end` or `die` as processes do."""

    def __init__(self, path: Path, url: str) -> None:
        self.mirror = Mirror(path, url)
        self.files = RunDirectory(path, config(url), fill=self.mirror.begin)
        self.mirror.__enter__()

    def end(self) -> None:
        self.mirror.__exit__(None)
        self.files.__exit__()

    def die(self) -> None:
        self.mirror._stop.set()
        self.mirror._is_left.set()
        self.mirror._thread.join(10)
        self.files.__exit__()


def do_work(run: RunDirectory, t: int) -> None:
    """An iteration, as its files."""
    write_atomically(run.at(f"{t}/rollouts/000000.parquet"), f"shard {t}")
    write_json(run.at(f"{t}/rollouts/_000000.json"), {"tasks": []})
    run.once(f"{t}/sample", dict)
    replace_directory(run.at(f"{t}/searcher/model"), partial(write_model, t))
    checkpoint(run, t, "a")
    run.once(f"{t}/searcher/train", dict)
    write_atomically(run.path / "report.json", json.dumps({"iterations": t}))


def write_model(t: int, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(LARGE + str(t).encode())
    (directory / "config.json").write_text("{}")


def checkpoint(run: RunDirectory, t: int, slot: str) -> None:
    write_atomically(run.at(f"{t}/searcher/learner/{slot}/rank_0.pt"), f"state {t} {slot}")
    write_json(run.at(f"{t}/searcher/learner/checkpoint.json"), {"slot": slot, "before": None})


def contents(run: Path) -> dict[str, bytes]:
    """All files but hidden ones and those that stay where they are."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {
        str(name): (run / name).read_bytes()
        for name in names
        if str(name) not in NOT_COPIED and not any(part.startswith(".") for part in name.parts)
    }


def copied(url: str) -> dict[str, bytes]:
    """The files of the copy, as its manifest has them."""
    store = Store(url)
    manifest = read_manifest(store)
    return {name: store.read(entry.key) or b"" for name, entry in manifest.files.items()} if manifest else {}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
