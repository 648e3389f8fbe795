"""The run directory through kills and resumes: what is there is whole, and nothing is computed or written twice."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.config import Config
from pipeline.core.config.loading import all_keys, load_config
from pipeline.core.errors import UserError
from pipeline.core.run import (
    FREE_TO_CHANGE,
    RunDirectory,
    RunFiles,
    flatten,
    is_worked_on,
    write_json,
)
from pipeline.methods import load


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the program catches it."""


def kill(*_: object, **__: object) -> Any:
    raise Killed


def config(*overrides: str) -> Config:
    return load_config(None, ("data.root=/", "model.path=somebody/model", *overrides))


def restarted(run: RunDirectory, *overrides: str) -> RunDirectory:
    """The same command once more, after its process has come to an end; with that goes its lock."""
    run._lock.close()
    return RunDirectory(run.path, config(*overrides))


def with_a_result(run: RunDirectory) -> RunDirectory:
    run.once("0/sample", dict)
    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "one", config())


# ---------------------------------------------------------------- opening


def test_a_new_run_keeps_its_resolved_configuration(tmp_path: Path) -> None:
    wanted = config("rollout.samples=2", "weighting=posterior", "data.train=a.jsonl", "learner.lora={}")
    RunDirectory(tmp_path / "run", wanted)
    assert load_config(tmp_path / "run" / "config.yaml") == wanted


def test_the_kept_configuration_holds_in_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here/data", "here/model", "here/encoder", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    given = config("data.root=data", "model.path=model", "retriever.encoder=encoder")
    run = with_a_result(RunDirectory(tmp_path / "run", given))
    kept = yaml.safe_load((run.path / "config.yaml").read_text())
    assert kept["data"]["root"] == str(tmp_path / "here" / "data")
    assert kept["retriever"]["encoder"] == str(tmp_path / "here" / "encoder")
    monkeypatch.chdir(tmp_path / "elsewhere")
    same = (f"model.path={tmp_path / 'here' / 'model'}", "retriever.encoder=../here/encoder")
    restarted(run, "data.root=../here/data", *same)


def test_a_run_that_was_moved_goes_on_with_its_data_at_the_old_path_or_behind_a_link_there(
    tmp_path: Path,
) -> None:
    data, moved = tmp_path / "data", tmp_path / "moved"
    data.mkdir()
    settings = config(f"data.root={data}", "data.train=train.jsonl")
    with RunDirectory(tmp_path / "run", settings) as run:
        run.once("0/sample", lambda: {"made": "before"})
    (tmp_path / "run").rename(moved)
    with RunDirectory(moved, settings) as run:
        assert run.once("0/sample", kill)["made"] == "before"
    data.rename(tmp_path / "new-data")
    given = config(f"data.root={tmp_path / 'new-data'}", "data.train=train.jsonl")
    with pytest.raises(UserError, match=r"data\.root"):
        RunDirectory(moved, given)
    data.symlink_to(tmp_path / "new-data")
    with RunDirectory(moved, given) as run:
        assert run.finished("0/sample")


@pytest.mark.parametrize("root", ["", "/data"])
def test_a_root_that_no_path_starts_from_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """A submitted job finds itself in another directory each time."""
    absolute = (
        "data.corpus=hf:a/corpus",
        "data.train=/data/train.jsonl",
        "cold_start.sources=/data/more.jsonl",
    )
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = with_a_result(RunDirectory(tmp_path / "run", config(*absolute, f"data.root={root}")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = restarted(run, *absolute, "data.root=")
    restarted(run, *absolute, "data.root=/other")


@pytest.mark.parametrize("key", ["data.train", "data.corpus", "cold_start.sources"])
def test_a_root_that_a_path_starts_from_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = with_a_result(RunDirectory(tmp_path / "run", config("data.root=", f"{key}=some.jsonl")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data\.root: .*here' -> .*elsewhere'"):
        restarted(run, "data.root=", f"{key}=some.jsonl")


def test_a_hub_name_is_kept_as_it_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", config("model.path=somebody/some-model"))
    assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["path"] == "somebody/some-model"


def test_an_empty_directory_may_become_a_run(tmp_path: Path) -> None:
    RunDirectory(tmp_path, config())
    assert (tmp_path / "config.yaml").is_file()


def test_a_run_goes_on_with_the_same_configuration(run: RunDirectory) -> None:
    run.once("1/sample", lambda: {"value": 1})
    before = contents(run.path)
    again = restarted(run)
    assert contents(run.path) == before
    assert again.finished("1/sample") == run.finished("1/sample")


def test_a_run_that_goes_on_says_how_far_it_is(run: RunDirectory) -> None:
    assert run.how_far(3) is None
    with_a_result(run)
    run.close_iteration(1)
    assert run.how_far(3) == f"going on with {run.path}: 1 of 3 iterations are finished"


def test_two_processes_do_not_work_on_one_run(run: RunDirectory) -> None:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(UserError, match=f"^{holder} is working on {run.path}; wait for it"):
        RunDirectory(run.path, config())
    assert restarted(run).path == run.path


def test_damaged_figures_are_named_with_their_mend(run: RunDirectory) -> None:
    run.once("1/sample", lambda: {"value": 1})
    (damaged := run.at("1/sample.json")).write_text("{")
    with pytest.raises(UserError, match=rf"^{damaged} is damaged .* or remove it"):
        run.finished("1/sample")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = RunDirectory(tmp_path / "run", config())
    assert "the file system has no locks" in caplog.text
    assert is_worked_on(run.path) is None


def test_another_failure_of_a_lock_is_no_missing_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        RunDirectory(tmp_path / "run", config())


def test_a_run_can_be_read_while_it_is_written(run: RunDirectory) -> None:
    run.once("1/evaluation", lambda: {"em": 1.0})
    assert (RunFiles(run.path).finished("1/evaluation") or {})["em"] == 1.0


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty and holds no run.*--run"):
        RunDirectory(tmp_path, config())
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_place_of_the_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("notes")
    with pytest.raises(UserError, match="--run"):
        RunDirectory(path, config())
    assert path.read_text() == "notes"


def test_a_run_that_was_killed_while_it_was_made_is_made_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
        with pytest.raises(Killed):
            RunDirectory(tmp_path / "run", config())
    assert not (tmp_path / "run" / "config.yaml").exists()
    RunDirectory(tmp_path / "run", config())
    assert load_config(tmp_path / "run" / "config.yaml") == config()


CHANGES = {
    "seed": "1",
    "weighting": "posterior",
    "learner.learning_rate": "1e-3",
    "data.train": "other.jsonl",
    "agent.tags.think": "['[S]', '[/S]']",
    "learner.lora": "{rank: 4}",
    "em.select_by": "f1",
}


@pytest.mark.parametrize(("key", "value"), CHANGES.items())
def test_another_configuration_is_refused_with_the_keys_that_differ_and_nothing_is_overwritten(
    run: RunDirectory, key: str, value: str
) -> None:
    before = contents(with_a_result(run).path)
    with pytest.raises(UserError) as caught:
        restarted(run, f"{key}={value}", "em.iterations=7")
    message = str(caught.value)
    assert f"\n  {key}" in message
    assert " -> " in message
    assert "em.iterations" not in message
    assert str(run.path) in message
    assert "--run" in message
    assert contents(run.path) == before


def test_every_difference_is_listed_with_the_old_and_the_new_value(run: RunDirectory) -> None:
    with pytest.raises(UserError) as caught:
        restarted(with_a_result(run), "seed=3", "rollout.samples=8", "weighting.temperature=2")
    lines = [line for line in str(caught.value).splitlines() if " -> " in line]
    assert lines == ["  seed: 0 -> 3", "  rollout.samples: 4 -> 8", "  weighting.temperature: 1.0 -> 2.0"]


def test_a_run_without_any_result_may_be_started_with_another_configuration(run: RunDirectory) -> None:
    restarted(run, "data.corpus=mended.jsonl")
    assert load_config(run.path / "config.yaml") == config("data.corpus=mended.jsonl")


def test_removing_a_section_is_a_difference_too(tmp_path: Path) -> None:
    run = with_a_result(RunDirectory(tmp_path, config("learner.lora.rank=4")))
    with pytest.raises(UserError, match=r"learner\.lora"):
        restarted(run)


@pytest.mark.parametrize(
    "override",
    [
        "em.iterations=9",
        "em.patience=1",
        "rollout.workers=3",
        "cluster.address=auto",
        "retriever.url=http://other:8000",
        "tracking.tensorboard=false",
    ],
)
def test_where_and_how_long_a_run_goes_may_change_and_is_remembered(run: RunDirectory, override: str) -> None:
    restarted(run, override)
    assert load_config(run.path / "config.yaml") == config(override)


def test_so_may_the_iterations_of_another_recipe_but_not_its_other_keys(tmp_path: Path) -> None:
    def preference(*overrides: str) -> Config:
        return load(None, ("recipe=preference", "data.root=/", "model.path=somebody/model", *overrides))

    run = with_a_result(RunDirectory(tmp_path / "run", preference()))
    run._lock.close()
    RunDirectory(run.path, preference("preference.iterations=9"))._lock.close()
    with pytest.raises(UserError, match=r"\n  preference\.beta: 0\.1 -> 0\.5"):
        RunDirectory(run.path, preference("preference.beta=0.5"))


def test_only_the_keys_themselves_are_free_to_change_not_keys_that_begin_like_them(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.run.FREE_TO_CHANGE", ("rollout.sample", "se", "rollout.top", "em"))
    for override in ("rollout.samples=8", "seed=1", "rollout.top_k=5"):
        with pytest.raises(UserError, match=override.split("=")[0]):
            restarted(with_a_result(run), override)
    restarted(run, "em.iterations=1")


def test_the_free_keys_exist() -> None:
    keys = all_keys(Config)
    assert [k for k in FREE_TO_CHANGE if k not in keys and not any(x.startswith(f"{k}.") for x in keys)] == []


@pytest.mark.parametrize(
    "text", ["seed: [", "seed: 0\nunknown_key: 1\n", "- a\n"], ids=["not yaml", "unknown key", "a list"]
)
def test_a_run_whose_configuration_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        UserError,
        match=r"config\.yaml(: unknown configuration key unknown_key| is not valid YAML| must hold sections)",
    ):
        RunDirectory(tmp_path, config())
    assert contents(tmp_path) == {"config.yaml": text.encode()}


def test_a_run_keeps_to_the_index_that_its_results_come_from(run: RunDirectory) -> None:
    run.keep_to("old")
    run.keep_to("mended before there was a result")
    with_a_result(run).keep_to("mended before there was a result")
    again = restarted(run)
    with pytest.raises(UserError, match=r"another index \(mended .*\) than there is now \(new\).*--run"):
        again.keep_to("new")
    again.keep_to("mended before there was a result")


@pytest.mark.parametrize(
    "written",
    [
        "iterations/0001/rollouts/_000000.json",
        "iterations/0001/rollouts/_loose/000000/tasks.json",
        "iterations/0000/evaluation.parts/searcher-0/_000003.json",
        "test/base.parts/searcher-0/_000000.json",
        "test/base.parts/searcher-0/_loose/000002/tasks.json",
    ],
)
def test_a_run_keeps_to_what_its_written_tasks_come_from(run: RunDirectory, written: str) -> None:
    """Also before its first step is finished: the rest of the phase is to be of the same kind."""
    run.keep_to("old")
    write_json(run.path / written, {"tasks": []})
    with pytest.raises(UserError, match="another index"):
        restarted(run).keep_to("new")
    with pytest.raises(UserError, match="another configuration"):
        restarted(run, "agent.documents=7")


# ---------------------------------------------------------------- phases


def test_a_phase_is_computed_once_and_then_read(run: RunDirectory) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"bound": -3.25, "counts": {"answered": 2}}

    first = run.once("1/sample", work)
    again = restarted(run).once("1/sample", work)
    assert len(calls) == 1
    assert first == again == run.finished("1/sample")
    assert {k: v for k, v in first.items() if k != "seconds"} == {"bound": -3.25, "counts": {"answered": 2}}
    assert first["seconds"] >= 0


def test_phases_of_other_iterations_and_other_phases_are_their_own(run: RunDirectory) -> None:
    run.once("1/sample", lambda: {"value": 1})
    assert run.finished("1/searcher/train") is None
    assert run.finished("2/sample") is None
    run.once("2/sample", lambda: {"value": 2})
    assert [(run.finished(f"{t}/sample") or {})["value"] for t in (1, 2)] == [1, 2]


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), Killed()])
def test_a_phase_that_was_cut_off_is_repeated(run: RunDirectory, failure: BaseException) -> None:
    def half() -> dict[str, Any]:
        shards = run.fresh("1/rollouts")
        (shards / "000000.parquet").write_text("half")
        (shards / "000009.parquet").write_text("a leftover, were it kept")
        raise failure

    def whole() -> dict[str, Any]:
        shards = run.fresh("1/rollouts")
        (shards / "000000.parquet").write_text("whole")
        return {"shards": 1}

    with pytest.raises(type(failure)):
        run.once("1/sample", half)
    assert run.finished("1/sample") is None
    resumed = restarted(run)
    assert resumed.once("1/sample", whole)["shards"] == 1
    assert contents(run.iteration(1) / "rollouts") == {"000000.parquet": b"whole"}


def test_a_phase_that_was_killed_while_its_result_was_written_is_repeated(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            run.once("1/searcher/train", lambda: {"loss": 1.0})
    assert run.finished("1/searcher/train") is None
    assert run.once("1/searcher/train", lambda: {"loss": 0.5})["loss"] == 0.5


def test_figures_that_are_not_finite_are_null_from_the_start(run: RunDirectory) -> None:
    result = run.once("1/searcher/train", lambda: {"loss": float("nan"), "norms": [1.0, float("inf")]})
    assert (result["loss"], result["norms"]) == (None, [1.0, None])
    assert result == run.finished("1/searcher/train")
    assert "NaN" not in run.at("1/searcher/train.json").read_text()


def test_test_results_are_computed_once_and_listed_by_name(run: RunDirectory) -> None:
    assert run.test_results() == {}
    run.once("test/base", lambda: {"iteration": 0, "em": 10.0})
    run.once("test/best", lambda: {"iteration": 2, "em": 50.0})
    run.once("test/best", lambda: pytest.fail("computed twice"))
    (run.path / "test" / "best.parquet").write_bytes(b"trajectories")
    assert {name: result["em"] for name, result in run.test_results().items()} == {"base": 10.0, "best": 50.0}


def test_a_step_that_is_forgotten_is_done_again(run: RunDirectory) -> None:
    run.once("test/best", lambda: {"iteration": 1, "em": 50.0})
    run.forget("test/best")
    run.once("test/best", lambda: {"iteration": 3, "em": 60.0})
    assert run.test_results()["best"]["em"] == 60.0


def test_steps_of_several_policies_lie_in_folders_of_their_own(run: RunDirectory) -> None:
    for step in ("3/sample", "3/selector/train", "3/generator/train", "2/selector/train"):
        run.once(step, lambda step=step: {"step": step})  # type: ignore[misc]
    (run.fresh("3/rollouts") / "_000000.json").write_text("{}")
    write_json(run.at("3/selector/model/config.json"), {})
    assert sorted(run.steps(3)) == ["generator/train", "sample", "selector/train"]
    assert run.steps(3)["selector/train"]["step"] == "3/selector/train"
    assert [run.newest_version(name) for name in ("selector", "generator", "critic")] == [3, 3, -1]
    assert [run.newest_version("selector", up_to=version) for version in (1, 2, 9)] == [-1, 2, 3]
    assert run.trained() == ["generator", "selector"]
    assert run.at("3/selector/model") == run.path / "iterations" / "0003" / "selector" / "model"


def test_a_run_of_another_recipe_or_of_an_earlier_version_is_refused(run: RunDirectory) -> None:
    stored = run.path / "config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("recipe: exsearch", "recipe: dro"))
    with pytest.raises(UserError, match="holds a run of the recipe dro, not exsearch"):
        restarted(run)
    stored.write_text(text.replace("cold_start:", "warmup:"))
    with pytest.raises(
        UserError, match=r"config\.yaml: the configuration key warmup is called cold_start now"
    ):
        restarted(run)
    stored.write_text(text)
    model = run.fresh("1/model")
    with pytest.raises(UserError, match="holds a run of an earlier version") as refused:
        restarted(run)
    assert str(model) in str(refused.value)


def test_a_fresh_directory_is_empty_whatever_was_there(run: RunDirectory) -> None:
    for _ in range(2):
        path = run.fresh("1/searcher/examples")
        assert list(path.iterdir()) == []
        (path / "deeper").mkdir()
        (path / "deeper" / "file").write_text("x")


def test_nested_settings_become_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_the_stored_configuration_is_plain_yaml(run: RunDirectory) -> None:
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert stored["rollout"]["samples"] == 4
    assert stored["weighting"]["method"] == "likelihood"
