"""`exsearch plot`, on runs as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.run import RunDirectory
from tests.pipeline.core.test_run_plots import OF_A_RECIPE, REPORT
from tests.pipeline.scores_support import questions, write_evaluation

BEGINS = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}


@pytest.fixture
def runs(folder: Path) -> Path:
    for name, report in (("x/a", REPORT), ("y/a", OF_A_RECIPE), ("new", None)):
        with RunDirectory(folder / name, load_config(folder / "config.yaml")) as run:
            if report is not None:
                (run.path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", BEGINS)
def test_figures_are_in_the_form_that_is_asked_for_and_the_same_each_time(
    runs: Path, run_command: Any, form: str
) -> None:
    written = []
    for out in ("first", "second"):
        result = run_command("plot", "x/a", "y/a", "--out", out, "--format", form)
        assert result.exit_code == 0, result.output
        written.append({path.name: path.read_bytes() for path in sorted((runs / out).iterdir())})
    assert written[0] == written[1]
    assert set(written[0]) == {
        f"{name}.{form}" for name in ("dev", "test", "hops", "searches", "e-step", "time")
    }
    assert all(content.startswith(BEGINS[form]) for content in written[0].values())


def test_runs_of_one_name_are_told_apart_and_what_is_not_drawn_is_said(runs: Path, run_command: Any) -> None:
    result = run_command("plot", "x/a", "y/a")
    assert result.exit_code == 0
    assert all(f">{name}<" in (runs / "figures/dev.svg").read_text() for name in ("x/a", "y/a"))
    result = run_command("plot", "y/a", "--out", "less")
    assert "time: nothing to draw" in result.output and not (runs / "less/time.svg").exists()


def test_what_takes_the_place_of_earlier_figures_is_named(runs: Path, run_command: Any) -> None:
    assert "replaced" not in run_command("plot", "x/a").output
    for name in ("dev", "time"):
        (runs / f"figures/{name}.svg").write_text("of another run")
    for other in set((runs / "figures").iterdir()) - {runs / "figures/dev.svg", runs / "figures/time.svg"}:
        other.unlink()
    result = run_command("plot", "x/a")
    assert "replaced in figures: dev.svg, time.svg (--out names another folder)" in result.output.splitlines()
    assert "of another run" not in (runs / "figures/dev.svg").read_text()


def test_runs_under_several_seeds_have_a_mean(runs: Path, run_command: Any) -> None:
    for arm, weighting in (("mine", "posterior"), ("other", "uniform")):
        for seed, right in ((1, "1100"), (2, "1101")):
            settings = [f"seed={seed}", f"weighting.method={weighting}", f"em.patience={seed}"]
            with RunDirectory(
                runs / arm / f"seed-{seed}", load_config(runs / "config.yaml", settings)
            ) as run:
                (run.path / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
            write_evaluation(run.path / "test" / "best.parquet", questions(4), right)
    result = run_command(
        "plot", *(f"{arm}/seed-{seed}" for arm in ("mine", "other") for seed in (1, 2)), "--out", "out"
    )

    assert result.exit_code == 0, result.output
    drawn = (runs / "out/ablation.svg").read_text()
    assert all(f">{arm} (2 seeds)<" in drawn for arm in ("mine", "other"))
    assert "ablation: nothing to draw" in run_command("plot", "x/a", "--out", "less").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a run directory"),
        (["new"], "new has no report yet"),
        (["x/a", "--format", "gif"], "--format gif: there are svg, pdf, png"),
        (["x/a", "--metric", "bleu"], "--metric bleu: there are em, f1, accuracy"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_written(
    runs: Path, run_command: Any, arguments: list[str], message: str
) -> None:
    result = run_command("plot", *arguments)
    assert result.exit_code == 2 and message in result.output
    assert not (runs / "figures").exists()
