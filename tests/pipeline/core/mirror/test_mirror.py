"""A run and its copy elsewhere: what is there is whole, an empty directory goes on from it, failures are survived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.status import in_words
from pipeline.core.errors import UserError
from pipeline.core.mirror import mirror as module
from pipeline.core.mirror.manifest import read_manifest
from pipeline.core.mirror.restore import AT_ONCE
from pipeline.core.mirror.scan import complete_files
from pipeline.core.mirror.store import Store, StoreError
from pipeline.core.run import write_atomically, write_json
from pipeline.core.status import run_status, status_of
from tests.pipeline.core.mirror.support import (
    LARGE,
    Process,
    checkpoint,
    contents,
    copied,
    do_work,
    until,
)


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the program catches it."""


# ---------------------------------------------------------------- there and back


def test_a_run_goes_on_in_an_empty_directory_on_another_machine(tmp_path: Path, url: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first = Process(here, url)
    for t in range(2):
        do_work(first.files, t)
    first.end()
    assert copied(url) == contents(here)

    second = Process(there, url)
    assert contents(there) == contents(here)
    assert second.files.finished("1/searcher/train") is not None
    do_work(second.files, 2)
    second.end()
    assert copied(url) == contents(there)
    with pytest.raises(UserError, match=r"went on in another directory than .*here"):
        Process(here, url)


def test_what_is_complete_is_uploaded_while_the_run_goes_on_and_what_is_not_stays_here(
    tmp_path: Path, url: str
) -> None:
    process = Process(tmp_path / "run", url)
    do_work(process.files, 0)
    half = process.files.at("1/searcher/learner/a/rank_0.pt")
    write_atomically(half, "half a checkpoint: no marker names it")
    (process.files.path / ".hidden.tmp").write_text("x")
    until(lambda: "iterations/0000/searcher/train.json" in copied(url))
    assert "iterations/0001/searcher/learner/a/rank_0.pt" not in copied(url)
    checkpoint(process.files, 1, "a")
    until(lambda: copied(url).get("iterations/0001/searcher/learner/a/rank_0.pt") == b"state 1 a")
    checkpoint(process.files, 1, "b")
    until(lambda: "iterations/0001/searcher/learner/b/rank_0.pt" in copied(url))
    names = copied(url)
    assert "iterations/0001/searcher/learner/a/rank_0.pt" not in names and ".hidden.tmp" not in names
    process.end()


def test_what_the_run_removes_goes_from_the_copy_and_files_that_do_not_change_lie_under_their_names(
    tmp_path: Path, s3: str
) -> None:
    process = Process(tmp_path / "run", s3)
    do_work(process.files, 0)
    until(lambda: "report.json" in copied(s3))
    for number in range(3):
        write_atomically(process.files.path / "report.json", json.dumps({"iterations": number + 7}))
        until(lambda number=number: str(number + 7).encode() in copied(s3)["report.json"])  # type: ignore[misc]
    process.files.at("0/rollouts/000000.parquet").unlink()
    process.end()
    store = Store(s3)
    manifest = read_manifest(store)
    assert manifest is not None
    model = "iterations/0000/searcher/model/model.safetensors"
    assert manifest.files[model].key == model  # for whoever looks into the bucket
    found = {name.split("/", 3)[-1] for name in store._fs.find(store._root)}
    assert found == manifest.keys | {"manifest.json"}


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize(
    "uploads", [5, 15, *(pytest.param(n, marks=pytest.mark.chaos) for n in (0, 10, 20, 25))]
)
def test_a_run_killed_at_any_upload_is_restored_as_it_once_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uploads: int
) -> None:
    """Whatever was last written there: markers speak only of what is there too, and every file is one of the run's."""
    url, run = f"memory://killed-{uploads}", tmp_path / "run"
    real, left = Store.write, uploads

    def write(self: Store, name: str, content: bytes) -> None:
        nonlocal left
        if not name.startswith("lease"):
            left -= 1
            if left < 0:
                raise StoreError("out of reach")
        real(self, name, content)

    with monkeypatch.context() as patched:
        process = Process(run, url)
        patched.setattr(Store, "write", write)
        for t in range(2):
            do_work(process.files, t)
            checkpoint(process.files, t, "b")
            time.sleep(0.1)
        process.die()
    again = tmp_path / "again"
    restored = Process(again, url)
    assert contents(again).items() <= contents(run).items() | dict(restored_configuration(again)).items()
    for marker in again.glob("iterations/*/sample.json"):
        assert (marker.parent / "rollouts/000000.parquet").exists()
    for marker in again.glob("iterations/*/searcher/learner/checkpoint.json"):
        slot = json.loads(marker.read_text())["slot"]
        assert (marker.parent / slot / "rank_0.pt").exists()
    restored.end()


def restored_configuration(run: Path) -> Iterator[tuple[str, bytes]]:
    """Report and checkpoint change with time: an earlier one may be in the copy."""
    for name, content in contents(run).items():
        if name.endswith(("report.json", "checkpoint.json", "config.yaml")) or "/learner/" in name:
            yield name, content


def test_a_restore_that_was_killed_goes_on(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Process(tmp_path / "here", url)
    do_work(first.files, 0)
    first.end()
    replace, renamed = os.replace, []

    def die(source: Any, target: Any) -> None:
        if ".restored" in str(source):
            renamed.append(target)
            if len(renamed) == 4:
                raise Killed
        replace(source, target)

    there = tmp_path / "there"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(Killed):
            Process(there, url)
    Process(there, url).end()
    assert contents(there) == contents(tmp_path / "here")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"x" + content[1:]])
def test_an_object_that_is_damaged_is_not_restored_and_said(
    tmp_path: Path, url: str, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    first = Process(tmp_path / "here", url)
    do_work(first.files, 0)
    first.end()
    store, name = Store(url), "iterations/0000/rollouts/000000.parquet"
    store.write(name, damage(store.read(name) or b""))
    Process(tmp_path / "there", url).end()
    assert contents(tmp_path / "here").keys() - contents(tmp_path / "there").keys() == {name}
    assert f"{name}: " in caplog.text and "it is not restored" in caplog.text


def test_a_damaged_manifest_is_refused(tmp_path: Path, url: str) -> None:
    Process(tmp_path / "here", url).end()
    Store(url).write("manifest.json", b'{"writer": ')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Process(tmp_path / "there", url)


# ---------------------------------------------------------------- failures


def test_a_store_that_fails_for_a_while_disturbs_nothing_and_is_shown(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Process(tmp_path / "run", s3)
    real = Store.write

    def fail(self: Store, name: str, content: bytes) -> None:
        raise StoreError(f"{name}: 503 slow down")

    monkeypatch.setattr(Store, "write", fail)
    do_work(process.files, 0)
    until(lambda: process.mirror.state.failures >= 3)
    state = json.loads((process.files.path / "mirror.json").read_text())
    assert state["behind"] > 0 and "503 slow down" in state["last_error"]
    assert caplog.text.count("is behind") == 1
    monkeypatch.setattr(Store, "write", real)
    until(lambda: process.mirror.state.last_error is None)
    process.end()
    assert copied(s3) == contents(tmp_path / "run")


def test_a_copy_that_is_not_whole_at_the_end_is_an_error_that_the_same_command_mends(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path / "run", url)
    until(lambda: bool(copied(url)))
    with monkeypatch.context() as patched:
        patched.setattr(module, "END_S", 0.3)
        patched.setattr(Store, "upload", lambda *_: (_ for _ in ()).throw(StoreError("out of reach")))
        do_work(process.files, 0)
        with pytest.raises(
            UserError, match=r"is not whole, \d+ files are missing .*out of reach.* the same command"
        ):
            process.end()
    process.files.__exit__()
    Process(tmp_path / "run", url).end()
    assert copied(url) == contents(tmp_path / "run")


def test_a_store_that_is_out_of_reach_or_not_there_is_refused_at_the_start(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"storage\.url cannot be used: .*Look at the address, the bucket"):
        Process(tmp_path / "one", "s3://no-such-bucket/run")
    with pytest.raises(UserError, match=r"nosuchprotocol://x cannot be used"):
        Process(tmp_path / "two", "nosuchprotocol://x")


def objects(url: str) -> set[str]:
    store = Store(url)
    return {path.split(f"{store._root}/", 1)[1] for path in store._fs.find(store._root)}


def test_a_checkpoint_that_changes_faster_than_it_is_uploaded_does_not_keep_the_rest_from_the_copy(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Process(tmp_path / "run", url)
    do_work(process.files, 0)
    checkpoint(process.files, 1, "a")
    marker = "iterations/0001/searcher/learner/checkpoint.json"
    until(lambda: marker in copied(url))
    learner = process.files.at("1/searcher/learner")
    before = {name: content for name, content in copied(url).items() if "0001/searcher/learner" in name}
    assert len(before) == 2
    upload, numbers = Store.upload, iter(range(1000))

    def slowly(self: Store, path: Path, name: str) -> None:
        upload(self, path, name)
        if path.parent.parent == learner:
            write_atomically(path, LARGE.decode("latin-1") + str(next(numbers)))

    with monkeypatch.context() as patched:
        patched.setattr(Store, "upload", slowly)
        write_atomically(learner / "b/rank_0.pt", LARGE.decode("latin-1"))
        write_json(learner / "checkpoint.json", {"slot": "b", "before": None})
        write_atomically(process.files.path / "report.json", "{}")
        until(lambda: copied(url)["report.json"] == b"{}" and next(numbers) > 50)
        there = copied(url)
    assert {name: content for name, content in there.items() if "0001/searcher/learner" in name} == before
    assert caplog.text.count("was replaced again while it was uploaded") == 1
    process.end()
    here = contents(tmp_path / "run").items()
    assert copied(url) == {name: content for name, content in here if "0001/searcher/learner/a" not in name}
    assert objects(url) == {*read_manifest(Store(url)).keys, "manifest.json"}


def test_a_checkpoint_that_goes_while_it_is_uploaded_leaves_no_older_one_beside_what_is_trained(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path / "run", url)
    checkpoint(process.files, 0, "a")
    marker, trained = (f"iterations/0000/searcher/{name}.json" for name in ("learner/checkpoint", "train"))
    until(lambda: marker in copied(url))
    process.die()
    learner, upload = process.files.at("0/searcher/learner"), Store.upload

    def slowly(self: Store, path: Path, name: str) -> None:
        upload(self, path, name)
        shutil.rmtree(learner)

    monkeypatch.setattr(Store, "upload", slowly)
    write_atomically(learner / "b/rank_0.pt", LARGE.decode("latin-1"))
    write_json(learner / "checkpoint.json", {"slot": "b", "before": None})
    process.files.once("0/searcher/train", dict)
    process.mirror._attempt()
    assert marker in copied(url) and trained not in copied(url)
    process.mirror._attempt()
    assert marker not in copied(url) and trained in copied(url)


def test_behind_an_upload_that_failed_no_others_of_that_look_are_begun(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path / "run", url)
    until(lambda: bool(copied(url)))
    process.die()
    begun: list[str] = []

    def fail(self: Store, path: Path, name: str) -> None:
        begun.append(name)
        raise StoreError("503 slow down")

    for t in range(20):
        do_work(process.files, t)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "upload", fail)
        patched.setattr(Store, "write", fail)
        assert not process.mirror._attempt()
    assert 1 <= len(begun) <= AT_ONCE
    assert process.mirror.state.last_error == "503 slow down"


HANGS = """
import sys, time
from pathlib import Path
from pipeline.core.mirror import mirror
from pipeline.core.mirror.store import Store
from tests.pipeline.core.mirror.support import Process, do_work
mirror.CUT_OFF_S, mirror.PERIOD_S = 1.0, 0.05
Store.upload = lambda self, path, name: print("hangs", flush=True) or time.sleep(1000)
process = Process(Path(sys.argv[1]), sys.argv[2])
for t in range(20):
    do_work(process.files, t)
time.sleep(1)
process.mirror.__exit__(KeyboardInterrupt)
print("ends", flush=True)
"""


def test_a_store_that_does_not_answer_keeps_no_process_that_was_stopped(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "run"), f"file://{tmp_path}/copy"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[4],
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("ends\n") and 0 < ended.stdout.count("hangs") < 20
    assert "is not whole" in ended.stderr and "an upload did not end within 1 s" in ended.stderr


# ---------------------------------------------------------------- seen from elsewhere


def test_how_a_run_stands_can_be_seen_from_its_copy(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.mirror.lease.LEASE_S", 60.0)
    with pytest.raises(UserError, match="holds no copy of a run"):
        status_of(url)
    process = Process(tmp_path / "run", url)
    write_json(
        process.files.path / "progress.json", {"state": "running", "updated": "2026-03-01T12:00:00+00:00"}
    )
    for t in range(2):
        do_work(process.files, t)
        process.files.close_iteration(t)
    until(lambda: {"progress.json", "iterations/0001/DONE"} <= copied(url).keys())
    found = status_of(url)
    assert (found["run"], found["state"], found["removed_models"]) == (url, "running", {})
    assert next(iter(found["steps"])) == "0/sample"
    process.end()
    assert status_of(url)["state"] == "killed"
    local = run_status(process.files.path)
    assert (local["mirror"]["url"], local["mirror"]["behind"]) == (url, 0)
    assert any(line.startswith(f"copy: {url}, ") for line in in_words(local))


def test_the_logs_of_actors_stay_where_they_are(tmp_path: Path) -> None:
    for name in ("logs/weighting-0.jsonl", "logs/weighting-0.jsonl.1", "run.log"):
        write_atomically(tmp_path / name, "a line\n")
    assert complete_files(tmp_path, {}).keys() == {"run.log"}
