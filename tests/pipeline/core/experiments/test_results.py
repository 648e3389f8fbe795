"""Results of runs: what is compared with what, the tables, the plots, and the page that they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.config.loading import load_config
from pipeline.core.errors import UserError
from pipeline.core.experiments.page import write_page
from pipeline.core.experiments.planned import PlannedRun, plan_runs
from pipeline.core.experiments.results import Results, read_results
from pipeline.core.experiments.spec import Experiment, read_experiment
from pipeline.core.experiments.tables import curve, make_table
from tests.pipeline.experiments_support import IsRight, finish
from tests.retriever_service.support import write_jsonl


def never(step: str, place: int) -> bool:
    return False


def every_second(step: str, place: int) -> bool:
    return place % 2 == 0


def better_with_time(step: str, place: int) -> bool:
    """One of 4 dev questions is right in the beginning, two after an iteration, three after two; all in the test."""
    return place < {"0/evaluation": 1, "1/evaluation": 2, "2/evaluation": 3}.get(step, 100)


def row(id_: str, place: int) -> dict[str, Any]:
    return {"id": id_, "question": f"{id_}?", "answers": ["Ada"], "hops": 1 + place % 2}


def study(tmp_path: Path, **keys: Any) -> tuple[Experiment, list[PlannedRun]]:
    """Two arms and two seeds, and their runs."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "p", "title": "t", "text": "text"}])
    for split, count in (("train", 4), ("dev", 4), ("test", 20)):
        write_jsonl(tmp_path / f"{split}.jsonl", [row(f"{split}{i}", i) for i in range(count)])
    files = {name: f"{name}.jsonl" for name in ("corpus", "train", "dev", "test")}
    config = {"data": {"root": str(tmp_path), **files}, "em": {"iterations": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    tree = {"title": "A study", "base": "./base.yaml", "seeds": [0, 1]}
    tree["arms"] = {"first": {}, "second": {"weighting": "uniform"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree | keys, sort_keys=False))
    experiment = read_experiment(tmp_path / "study.yaml")
    return experiment, plan_runs(experiment, tmp_path / "out", configs=tmp_path, load=load_config)


def made(tmp_path: Path, how: Mapping[str, IsRight], **keys: Any) -> Results:
    """With the runs of the named arms, or of one seed ("second, seed 1"), finished."""
    experiment, runs = study(tmp_path, **keys)
    for run in runs:
        if (is_right := how.get(run.title, how.get(run.arm.name))) is not None:
            finish(run, is_right)
    return read_results(experiment, runs)


def test_an_arm_is_compared_seed_by_seed_and_the_rest_is_said(tmp_path: Path) -> None:
    results = made(tmp_path, {"first": every_second, "second, seed 1": never})

    table = make_table("test", results)

    assert results.missing == ("second, seed 0",)
    assert "| test EM | seed 0 | seed 1 | mean (sd) | 95 % | minus first | 95 % | p |" in table
    assert "| second |  | 0.0 | 0.0 | 0.0 to 16.1 | -50.0 |" in table  # Wilson's bound of none of 20
    assert "| first | 50.0 | 50.0 | 50.0 (0.0) |" in table


def test_without_its_baseline_nothing_is_compared(tmp_path: Path) -> None:
    results = made(tmp_path, {"second": never})

    assert results.baseline is None
    assert "minus" not in make_table("test", results)
    assert "\\*" not in make_table("hops", results)


def test_a_group_that_differs_is_marked(tmp_path: Path) -> None:
    hops = make_table("hops", made(tmp_path, {"first": every_second, "second": never}))

    first, second = hops.splitlines()[2:4]
    assert first.startswith("| first | 100.0 (") and "| 0.0 (" in first
    assert second.startswith("| second | 0.0 (") and second.count("\\*") == 1
    assert "corrected for the 2 comparisons" in hops
    results = made(tmp_path, {})
    assert make_table("types", results) == "No test question names its types."


def test_costs_compare_at_equal_tokens_and_to_the_same_score(tmp_path: Path) -> None:
    results = made(
        tmp_path,
        {"first": better_with_time, "second": every_second},
        arms={"first": {}, "second": {"em.iterations": 1}},
    )

    points = curve(results.arms[0])
    table = make_table("cost", results)

    assert [(p.iteration, p.dev, p.tokens, p.seconds) for p in points] == [
        (0, 0.25, 0, 2.0),
        (1, 0.5, 1000, 12.0),
        (2, 0.75, 2000, 22.0),
    ]
    assert "dev EM at 1,000 tokens" in table
    assert "| first | 2,000 | 22 | 50.0 | 75.0 | 2,000 | 22 | 2,000 | 22 |" in table
    assert "| second | 1,000 | 12 | 50.0 | 50.0 | 0 | 2 | 1,000 | 12 |" in table


def test_iterations_are_shown_with_their_intervals(tmp_path: Path) -> None:
    table = make_table("iterations", made(tmp_path, {"first": better_with_time}))

    assert table.splitlines()[0] == "| dev EM after iteration | 0 | 1 | 2 |"
    assert [cell.split(" (")[0] for cell in table.splitlines()[2].split(" | ")[1:]] == [
        "25.0",
        "50.0",
        "75.0",
    ]


def test_results_are_read_from_the_runs_alone(tmp_path: Path) -> None:
    experiment, runs = study(tmp_path)
    finish(runs[0], every_second)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert np.mean(read_results(experiment, runs).arms[0].tests()[1]) == 0.5


def test_other_questions_under_the_same_ids_are_not_compared(tmp_path: Path) -> None:
    other = [row(f"test{i}", i) | {"answers": ["Bob"]} for i in range(20)]
    write_jsonl(tmp_path / "other.jsonl", other)
    arms = {"first": {}, "second": {"data.test": "other.jsonl"}}
    with pytest.raises(UserError, match=r"20 of 20 ids name others, say 'test0': other gold answers"):
        made(tmp_path, {"first": every_second, "second": every_second}, arms=arms)


def test_scores_by_other_rules_are_not_compared(tmp_path: Path) -> None:
    experiment, runs = study(tmp_path)
    for run in runs:
        finish(run, every_second)
    scored = pq.read_table(runs[1].path / "test" / "best.parquet")
    as_musique = scored.replace_schema_metadata({b"exsearch.scored_by": b"musique"})
    pq.write_table(as_musique, runs[1].path / "test" / "best.parquet")
    with pytest.raises(UserError, match=r"evaluation.protocol: exsearch, .* by musique"):
        read_results(experiment, runs)


def test_a_run_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    experiment, runs = study(tmp_path)
    finish(runs[0], every_second)
    path = runs[0].path / "test" / "best.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["em"]), path)
    with pytest.raises(UserError, match=r"best\.parquet was written by an earlier version.*remove the run"):
        read_results(experiment, runs)


def test_patience_would_compare_runs_of_different_lengths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arm second: patience is 1.*set em\.patience=null"):
        study(tmp_path, arms={"first": {}, "second": {"em.patience": 1}})


def test_a_damaged_file_of_a_run_is_named(tmp_path: Path) -> None:
    experiment, runs = study(tmp_path)
    finish(runs[0], every_second)
    (runs[0].path / "test" / "best.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"best\.parquet is damaged"):
        read_results(experiment, runs)


def test_a_page_keeps_what_others_wrote_and_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = made(tmp_path, {"first": better_with_time}, plots=["test", "iterations", "tokens"])
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("# Mine\n\nwords before\n")

    files = write_page(results, page.parent, "exsearch experiment study")
    once = {path.name: path.read_bytes() for path in files}
    page.write_text(page.read_text() + "\nwords behind\n")
    write_page(results, page.parent, "exsearch experiment study")

    text = page.read_text()
    assert text.startswith("# Mine\n\nwords before\n\n<!-- experiment study") and text.endswith(
        "\nwords behind\n"
    )
    assert text.encode() == once["results.md"] + b"\nwords behind\n"
    assert {path.name: path.read_bytes() for path in files[1:]} == {
        name: drawn for name, drawn in once.items() if name != "results.md"
    }
    plots = {f"study-{plot}.svg" for plot in ("test", "iterations", "tokens")}
    assert set(once) == {"results.md", "study.parquet", *plots}
    assert b"<dc:date>" not in once["study-test.svg"] and b">first<" in once["study-iterations.svg"]


def test_a_page_whose_part_has_lost_its_end_is_not_written(tmp_path: Path) -> None:
    results = made(tmp_path, {"first": never}, plots=[])
    page = write_page(results, tmp_path / "docs", "command")[0]
    broken = page.read_text().replace("<!-- end of", "<!-- and of")
    page.write_text(broken)
    with pytest.raises(UserError, match="the part of study should stand once between"):
        write_page(results, tmp_path / "docs", "command")
    assert page.read_text() == broken


@pytest.mark.parametrize(("values", "ticks"), [([1, 4], {"1", "4"}), (["uniform", "posterior"], {"uniform"})])
def test_a_parameter_is_drawn_against_its_values(tmp_path: Path, values: list[Any], ticks: set[str]) -> None:
    key = "rollout.samples" if values == [1, 4] else "weighting"
    names = [f"{key.rsplit('.', 1)[-1]}={value}" for value in values]
    results = made(
        tmp_path, dict.fromkeys(names, every_second), arms={}, vary={key: values}, plots=["parameter"]
    )

    (_, plot, _) = write_page(results, tmp_path / "docs", "command")

    drawn = plot.read_text()
    assert key in drawn and all(f">{tick}<" in drawn for tick in ticks)


def test_scores_are_those_of_the_runs(tmp_path: Path) -> None:
    results = made(tmp_path, {"first": every_second, "second": never}, metric="f1")
    (first, second) = results.arms
    assert np.mean(first.tests()[1]) == 0.5 and np.mean(second.tests()[1]) == 0.0
    assert first.last_iteration == 2
