"""`exsearch experiment`: what is made, kept, gone on with and written. Runs are made up in milliseconds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import methods
from pipeline.commands.demo import world_settings
from pipeline.core.experiments.numbers import kept_numbers
from pipeline.core.experiments.planned import PlannedRun, plan_runs
from pipeline.core.experiments.spec import Spec, read_experiment
from pipeline.core.shipped import CONFIGS
from tests.pipeline.commands_support import contents, question
from tests.pipeline.experiments_support import finish
from tests.retriever_service.support import write_jsonl

STUDY = {
    "title": "A study",
    "about": "What samples do.",
    "base": "config.yaml",
    "common": {"data.test": "test.jsonl", "em": {"iterations": 2}, "evaluation.baselines": False},
    "seeds": [0, 1],
    "arms": {
        "likelihood": {},
        "uniform weights": {"weighting": "uniform", "rollout.samples": 2},
        "start": {"of": "likelihood", "test": "cold_start"},
    },
}


@pytest.fixture
def study(folder: Path) -> Callable[..., Path]:
    """Writes an experiment of the user's folder, with other keys."""
    write_jsonl(
        folder / "test.jsonl",
        [question(f"t{i}") | {"hops": 1 + i % 2, "type": "bridge"} for i in range(40)],
    )

    def write(**keys: Any) -> Path:
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | keys, sort_keys=False))
        return folder / "study.yaml"

    return write


class Runner:
    """In place of the process of a run. `fails` and `interrupts` name runs that do not come to their end."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fails = ""
        self.interrupts = ""

    def __call__(self, run: PlannedRun, tell: Callable[[str], None]) -> str | None:
        tell("iteration 1: sampling")
        if run.title == self.interrupts:
            raise KeyboardInterrupt
        if run.title == self.fails:
            return "exit code 1, out of luck"
        every = 4 if run.arm.name == "likelihood" else 2
        finish(run, lambda step, place: bool(place % every) if step == "test/best" else place % 3 == 0)
        self.made.append(run.title)
        return None


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner()
    monkeypatch.setattr("pipeline.commands.experiment.run_in_process", made)
    return made


ALL = ["likelihood, seed 0", "uniform weights, seed 0", "likelihood, seed 1", "uniform weights, seed 1"]


def test_every_arm_is_run_under_every_seed_and_shown_with_its_difference(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    result = run_command("experiment", study(), "--out", "out", "--results", "docs")

    assert result.exit_code == 0, result.output
    assert runner.made == ALL
    page = (folder / "docs" / "results.md").read_text()
    assert "## A study\n\nWhat samples do.\n\n```bash\nexsearch experiment " in page
    assert "| likelihood | 75.0 | 75.0 | 75.0 (0.0) |" in page
    assert "| uniform weights | 50.0 | 50.0 | 50.0 (0.0) |" in page
    assert "| -25.0 |" in page
    assert "| start | 35.0 | 35.0 | 35.0 (0.0) |" in page
    assert "40 test questions" in page
    assert "1 hop (20) | 2 hops (20)" in page and "bridge (40)" in page
    assert "![A study: study-test](figures/study-test.svg)" in page
    assert {path.name for path in (folder / "docs" / "figures").iterdir()} == {
        "study-test.svg",
        "study-iterations.svg",
        "study.parquet",
    }


def test_what_is_finished_is_not_made_again_and_its_results_are_the_same_bytes(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    run_command("experiment", study(), "--out", "out", "--results", "docs")
    before = contents(folder / "docs")

    again = run_command("experiment", study(), "--out", "out", "--results", "docs")
    table = run_command("experiment", study(), "--out", "out", "--results", "docs", "--table")

    assert (again.exit_code, table.exit_code) == (0, 0), again.output + table.output
    assert runner.made == ALL
    assert contents(folder / "docs") == before


def test_a_run_that_fails_is_named_the_others_go_on_and_the_same_command_makes_it(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    runner.fails = ALL[1]
    result = run_command("experiment", study(), "--out", "out")

    assert result.exit_code == 1
    assert "1 of 4 runs failed:\n  uniform weights, seed 0: exit code 1, out of luck" in result.stderr
    assert "go on with: " in result.stderr
    assert runner.made == [ALL[0], *ALL[2:]]
    page = (folder / "out" / "study" / "results.md").read_text()
    assert "Not finished, and not in the tables: 1 run (uniform weights, seed 0)." in page

    runner.fails, runner.made = "", []
    assert run_command("experiment", study(), "--out", "out").exit_code == 0
    assert runner.made == [ALL[1]]
    assert "Not finished" not in (folder / "out" / "study" / "results.md").read_text()


def test_an_interrupted_experiment_has_the_results_so_far_says_how_to_go_on_and_does(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    runner.interrupts = ALL[2]
    result = run_command("experiment", study(), "--out", "out")
    assert result.exit_code == 130
    assert "interrupted by SIGINT; what was finished is kept, go on with: " in result.stderr
    page = (folder / "out/study/results.md").read_text()
    assert "Not finished, and not in the tables: 2 runs" in page and kept_numbers(folder / "out/study")

    runner.interrupts, runner.made = "", []
    assert run_command("experiment", study(), "--out", "out").exit_code == 0
    assert runner.made == ALL[2:]


def test_more_iterations_go_on_with_runs_that_were_finished_with_fewer(
    run_command: Any, study: Any, runner: Runner
) -> None:
    run_command("experiment", study(), "--out", "out")
    runner.made = []
    result = run_command("experiment", study(), "--out", "out", "em.iterations=3")
    assert result.exit_code == 0, result.output
    assert runner.made == ALL


def test_only_the_wanted_seed_is_run(run_command: Any, study: Any, runner: Runner, refused: Any) -> None:
    assert "has no seed 7; its seeds are [0, 1]" in refused("experiment", study(), "--seed", 7)
    assert run_command("experiment", study(), "--out", "out", "--seed", 1).exit_code == 0
    assert runner.made == ALL[2:]


def test_the_results_of_one_more_seed_are_those_of_all(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    for seed, missing in ((0, "2 runs (likelihood, seed 1; uniform weights, seed 1)"), (1, "")):
        assert run_command("experiment", study(), "--out", "out", "--seed", seed).exit_code == 0
        page = (folder / "out" / "study" / "results.md").read_text()
        assert (f"Not finished, and not in the tables: {missing}" if missing else "") in page
    assert "| likelihood | 75.0 | 75.0 | 75.0 (0.0) |" in page
    assert "Not finished" not in page and " --out out\n```" in page


def test_a_dry_run_shows_runs_and_times_and_makes_nothing(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    file = study()
    before = contents(folder)
    result = run_command("experiment", file, "--out", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "study: 4 runs" in result.stdout
    assert "start: the test cold_start of the runs of likelihood" in result.stdout
    assert contents(folder) == before and runner.made == []

    runner.fails = ALL[1]
    run_command("experiment", file, "--out", "out", "--seed", 0)
    result = run_command("experiment", file, "--out", "out", "--dry-run")
    # Per run: three trainings of 2 s, two samplings that were waited for for 8 s.
    assert "0:00:22 measured" in result.stdout and "0:00:22 as others" in result.stdout
    assert "about 0:01:06 left" in result.stdout


def test_tables_of_nothing_are_refused(refused: Any, study: Any, runner: Runner) -> None:
    assert "no run of study is finished in " in refused("experiment", study(), "--table")


def test_runs_that_search_the_same_share_one_index(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    arms = {
        "exact": {},
        "other weights": {"weighting": "uniform"},
        "short": {"retriever.max_tokens": 16},
        "words": {"retriever.method": "hybrid"},
        "words alone": {"retriever.method": "bm25"},
    }
    result = run_command("experiment", study(arms=arms, seeds=[0]), "--out", "out")
    assert result.exit_code == 0, result.output

    used = {
        name: yaml.safe_load((folder / "out" / "study" / name / "seed-0" / "config.yaml").read_text())[
            "retriever"
        ]["index"]
        for name in ("exact", "other-weights", "short", "words", "words-alone")
    }
    assert used["exact"] == used["other-weights"] and used["words"] == used["words-alone"]
    assert len(set(used.values())) == 3
    assert all((Path(index) / "manifest.json").exists() for index in used.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"arms": {"a": {"rollout.sample": 2}}},
            "arm a: unknown configuration key rollout.sample; did you mean",
        ),
        ({"arms": {"a": {"base": "nowhere"}}}, "arm a: no configuration file"),
        ({"arms": {"a": {"em.iterations": "many"}}}, "arm a: configuration key em.iterations"),
        ({"arms": {"a": {"data.test": []}}}, "arm a: data.test is empty"),
        ({"arms": {"a": {"seed": 3}}}, "arm a: the seed of a run is the experiment's to set"),
        ({"arms": {"a": {"data.test": "nothing.jsonl"}}}, "no question file nothing.jsonl"),
        ({"arms": {"a": {"model.path": "./nowhere"}}}, "model.path: ./nowhere does not exist"),
        (
            {"arms": {"a": {}, "b": {"of": "a", "test": "one_search"}}},
            "make no test one_search; they make base, cold",
        ),
    ],
)
def test_what_is_wrong_with_an_arm_is_said_before_anything_starts(
    refused: Any, study: Any, runner: Runner, keys: dict[str, Any], message: str
) -> None:
    assert message in refused("experiment", study(**keys), "--out", "out")
    assert runner.made == []


def test_an_override_that_undoes_an_arm_is_refused(refused: Any, study: Any, runner: Runner) -> None:
    message = refused("experiment", study(), "--out", "out", "weighting.method=posterior")
    assert "weighting is what the arms of study differ in" in message


def test_runs_of_another_experiment_are_not_mixed_in(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    run_command("experiment", study(), "--out", "out")
    result = run_command("experiment", study(), "--out", "out", "learner.learning_rate=0.1")
    assert result.exit_code == 2
    assert "arm likelihood" in result.stderr and "would mix two experiments" in result.stderr


def test_a_run_that_another_experiment_has_made_is_not_made_again(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    other = folder / "other.yaml"
    other.write_text(study(arms={"as it is": {}, "posterior": {"weighting": "posterior"}}).read_text())
    run_command("experiment", study(), "--out", "out")
    runner.made = []

    dry = run_command("experiment", other, "--out", "out", "--dry-run")
    result = run_command("experiment", other, "--out", "out")

    assert "as it is 2 0 0 2 0" in re.sub(r"[ │]+", " ", dry.stdout)
    assert result.exit_code == 0, result.output
    assert "as it is, seed 0: is the run out/study/likelihood/seed-0" in result.output
    assert runner.made == ["posterior, seed 0", "posterior, seed 1"]
    assert "| as it is | 75.0 | 75.0 | 75.0 (0.0) |" in (folder / "out" / "other" / "results.md").read_text()

    runner.made = []
    before = contents(folder / "out" / "study")
    assert run_command("experiment", other, "--out", "out", "em.iterations=3", "--seed", 0).exit_code == 0
    assert runner.made == ["as it is, seed 0", "posterior, seed 0"]
    assert contents(folder / "out" / "study") == before  # not trained on through the link

    shutil.rmtree(folder / "out" / "study")
    shutil.rmtree(folder / "out" / "other" / "figures")
    runner.made = []
    assert run_command("experiment", other, "--out", "out", "--seed", 1).exit_code == 0
    assert runner.made == ["as it is, seed 1"]


def test_runs_whose_numbers_are_kept_are_not_made_again(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    """Also where their directories are gone, or are on another machine; by other experiments as well."""
    run_command("experiment", study(), "--out", "out", "--results", "docs", "--seed", 0)
    run_command("experiment", study(), "--out", "out", "--results", "whole")
    shutil.rmtree(folder / "out")
    other = folder / "other.yaml"
    other.write_text(study(arms={"as it is": {}}, seeds=[0]).read_text())
    runner.made = []

    table = run_command("experiment", study(), "--out", "there", "--results", "docs", "--table")
    assert table.exit_code == 0, table.output
    dry = run_command("experiment", study(), "--out", "there", "--results", "docs", "--dry-run")
    assert "likelihood 2 1 0 0 0 0:00:22 measured" in re.sub(r"[ │]+", " ", dry.stdout)
    again = run_command("experiment", study(), "--out", "there", "--results", "docs")
    assert again.exit_code == 0, again.output
    assert "2 of 4 runs have their numbers in the results already" in again.output
    assert runner.made == ALL[2:]
    shutil.rmtree(folder / "there")
    assert run_command("experiment", other, "--out", "there", "--results", "docs").exit_code == 0
    assert run_command("experiment", study(), "--out", "there", "--results", "docs").exit_code == 0
    assert runner.made == ALL[2:]

    made, kept = contents(folder / "whole"), contents(folder / "docs")
    for name in ("figures/study.parquet", "figures/study-test.svg", "figures/study-iterations.svg"):
        assert kept[name] == made[name]
    assert "| as it is | 75.0 | 75.0 |" in (folder / "docs" / "results.md").read_text()


def test_numbers_of_other_settings_are_not_taken(
    run_command: Any, study: Any, runner: Runner, folder: Path
) -> None:
    run_command("experiment", study(), "--out", "out", "--results", "docs")
    runner.made = []
    changed = ("experiment", study(), "--out", "there", "--results", "docs", "learner.learning_rate=0.1")
    assert run_command(*changed).exit_code == 0
    assert runner.made == ALL


@pytest.mark.parametrize("damage", ["damaged", "written by another version"])
def test_numbers_that_cannot_be_read_are_named_before_anything_starts(
    run_command: Any, refused: Any, study: Any, runner: Runner, folder: Path, damage: str
) -> None:
    run_command("experiment", study(), "--out", "out", "--results", "docs", "--seed", 0)
    path = folder / "docs" / "figures" / "study.parquet"
    if damage == "damaged":
        path.write_bytes(b"PAR1")
    else:
        pq.write_table(pq.read_table(path).drop_columns(["seed"]), path)
    runner.made = []
    assert f"study.parquet {'is' if damage == 'damaged' else 'was'} {damage}" in refused(
        "experiment", study(), "--out", "out", "--results", "docs"
    )
    assert runner.made == []


@pytest.mark.parametrize("difference", ["more iterations", "not finished", "a directory in its place"])
def test_a_run_of_another_experiment_that_is_not_the_same_is_made(
    run_command: Any, study: Any, runner: Runner, folder: Path, difference: str
) -> None:
    other = folder / "other.yaml"
    other.write_text(study(arms={"as it is": {}}, seeds=[0]).read_text())
    if difference == "not finished":
        runner.fails = ALL[0]
    longer = ["em.iterations=3"] if difference == "more iterations" else []
    run_command("experiment", study(), "--out", "out", *longer)
    if difference == "a directory in its place":  # of a process that was killed at its very beginning
        (folder / "out" / "other" / "as-it-is" / "seed-0").mkdir(parents=True)
    runner.fails, runner.made = "", []

    assert run_command("experiment", other, "--out", "out").exit_code == 0
    assert runner.made == ["as it is, seed 0"]


def test_an_experiment_cannot_have_the_name_of_what_experiments_share(refused: Any, study: Any) -> None:
    file = study()
    message = refused("experiment", file.rename(file.with_name("world-small.yaml")))
    assert "the folder world-small is for something else; give the file another name" in message


def test_an_experiment_that_there_is_not(refused: Any) -> None:
    assert "there is no experiment weighings; did you mean weightings?" in refused("experiment", "weighings")
    assert "no experiment file nothing.yaml" in refused("experiment", "nothing.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_has_runs_that_can_be_planned(path: Path, tmp_path: Path) -> None:
    experiment = read_experiment(path)

    runs = plan_runs(
        experiment,
        tmp_path,
        configs=CONFIGS,
        load=methods.load,
        defaults=world_settings(tmp_path / "world", 2),
    )

    assert len(runs) == len(experiment.spec.seeds) * len(experiment.with_runs)
    assert len({json.dumps(run.config.model_dump(mode="json")) for run in runs}) == len(runs)
    # The same questions for all arms and seeds, as far as there is a key for it.
    assert {run.config.data.test_limit for run in runs} == {None}
    assert f"exsearch experiment {path.stem}" in path.read_text()


def test_the_page_names_every_key_and_every_shipped_experiment() -> None:
    page = (CONFIGS.parent / "docs" / "experiments.md").read_text()
    file, shipped = page.partition("## The file")[2], page.partition("## Shipped experiments")[2]

    assert re.findall(r"^\| `(\w+)` \|", file, re.MULTILINE) == list(Spec.model_fields)
    runs = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", shipped, re.MULTILINE))
    experiments = map(read_experiment, (CONFIGS / "experiments").glob("*.yaml"))
    assert runs == {e.name: str(len(e.spec.seeds) * len(e.with_runs)) for e in experiments}
