"""What the figures of runs show: the numbers of their reports at the right places, and nothing that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.core import run_plots
from pipeline.core.run_plots import PLOTS, Reported, draw


def scores(em: float, **more: Any) -> dict[str, Any]:
    return {"em": em, "em_interval": [em - 5, em + 5], "f1": em + 1, "f1_interval": [em - 4, em + 6], **more}


def dev(em: float, searches: float) -> dict[str, Any]:
    by_hops = {"1": scores(em + 10), "2": scores(em - 10)}
    return scores(em, searches=searches, gold_recall=em + 20, by_hops=by_hops)


def sampled(bound: float) -> dict[str, Any]:
    return {
        "likelihood_bound": bound,
        "likelihood_bound_stderr": 1.0,
        "effective_sample_size": 2.5,
        "all_failed_share": 40.0,
    }


SECONDS = {"expectation": 60.0, "maximisation": 120.0, "evaluation": 30.0}
REPORT = {
    "cold_start": {"dev": dev(30, 1.5), "phase_seconds": SECONDS, "train": {"trajectories": 16}},
    "iterations": [
        {"iteration": 1, "dev": dev(40, 1.8), "train": sampled(-9.0), "phase_seconds": SECONDS},
        {"iteration": 2, "dev": dev(50, 2.1), "train": sampled(-5.0), "phase_seconds": SECONDS},
    ],
    "test": {"best": scores(51), "one_search": scores(20), "base": scores(10) | {"em_interval": None}},
}
OF_A_RECIPE = {
    "start": {"evaluation": {"scores": scores(11)}},
    "iterations": [{"iteration": 1, "evaluation": {"scores": scores(12)}, "sample": {"kept": 3}}],
    "test": {"best": scores(13), "start": scores(11)},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Figure]:
    """The figures by the files that they were meant for."""
    found: dict[Path, Figure] = {}

    @contextmanager
    def keep(path: Path, width: float, height: float) -> Iterator[Figure]:
        found[path] = Figure(figsize=(width, height))
        yield found[path]

    monkeypatch.setattr(run_plots, "figure_file", keep)
    return found


def panels(drawn: dict[Path, Figure], name: str, *runs: Reported, metric: str = "em") -> list[Axes]:
    assert draw(name, runs, metric, Path(name))
    return drawn[Path(name)].axes


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """By the names in the legend; lines without a name are intervals."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): list(map(tuple, line.get_xydata().tolist())) for line in named}  # type: ignore[union-attr]


def intervals(axes: Axes) -> list[list[float]]:
    unnamed = [line for line in axes.lines if str(line.get_label()).startswith("_")]
    return [list(map(float, line.get_ydata())) for line in unnamed]  # type: ignore[arg-type]


ONE, OTHER = Reported("one", REPORT), Reported("other", OF_A_RECIPE)


def test_dev_scores_begin_with_what_the_run_began_with_and_have_their_intervals(
    drawn: dict[Path, Figure],
) -> None:
    (axes,) = panels(drawn, "dev", ONE, OTHER)
    assert curves(axes) == {"one": [(0, 30), (1, 40), (2, 50)], "other": [(0, 11), (1, 12)]}
    assert intervals(axes) == [[25, 35], [35, 45], [45, 55], [6, 16], [7, 17]]
    (axes,) = panels(drawn, "dev", ONE, metric="f1")
    assert curves(axes) == {"one": [(0, 31), (1, 41), (2, 51)]}


def test_hops_have_a_panel_of_each_run_that_counts_them(drawn: dict[Path, Figure]) -> None:
    (axes,) = panels(drawn, "hops", ONE, OTHER)
    assert curves(axes) == {"1 hop": [(0, 40), (1, 50), (2, 60)], "2 hops": [(0, 20), (1, 30), (2, 40)]}
    assert axes.get_title().endswith(": one")


def test_an_e_step_beside_a_training_is_of_the_model_before_that(drawn: dict[Path, Figure]) -> None:
    (bound, *_) = panels(drawn, "e-step", Reported("one", REPORT, behind=2))
    assert curves(bound) == {"one": [(0, -9), (0, -5)]}


def test_an_e_step_is_of_the_model_before_it(drawn: dict[Path, Figure]) -> None:
    bound, size, failed = panels(drawn, "e-step", ONE, OTHER)
    assert curves(bound) == {"one": [(0, -9), (1, -5)]}
    assert intervals(bound)[0] == pytest.approx([-10.96, -7.04])
    assert (curves(size)["one"][0], curves(failed)["one"][1]) == ((0, 2.5), (1, 40))


def test_searches_and_what_they_find(drawn: dict[Path, Figure]) -> None:
    searches, found = panels(drawn, "searches", ONE)
    assert (curves(searches)["one"], curves(found)["one"]) == (
        [(0, 1.5), (1, 1.8), (2, 2.1)],
        [(0, 50), (1, 60), (2, 70)],
    )


def test_models_of_a_test_are_in_their_order_from_the_top(drawn: dict[Path, Figure]) -> None:
    (axes,) = panels(drawn, "test", OTHER)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["start", "best"]
    (axes,) = panels(drawn, "test", ONE)
    rows = dict(zip((t.get_text() for t in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert sorted(rows, key=lambda name: -rows[name]) == ["base", "one search", "best"]
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2] == [
        [15, 25],
        [46, 56],
    ]  # type: ignore[arg-type]
    means = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1}  # type: ignore[arg-type,index]
    assert {name: means[place] for name, place in rows.items()} == {"base": 10, "one search": 20, "best": 51}


def of_seed(name: str, settings: str, *right: float, first: int = 0) -> Reported:
    scores = {f"q{first + n}": value for n, value in enumerate(right)}
    return Reported(name, REPORT, settings=settings, best={"em": scores})


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_their_mean(drawn: dict[Path, Figure]) -> None:
    first, second = of_seed("a/seed-1", "a", 1, 0, 1, 0), of_seed("a/seed-2", "a", 1, 1, 1, 1)
    (axes,) = panels(drawn, "ablation", first, of_seed("b", "b", 0, 0, 0, 1), second)

    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (2 seeds)", "b"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]  # type: ignore[arg-type,index]
    assert points == [(50, 2), (100, 2), (75, 2), (25, 1)]
    of_a, of_b = (list(map(float, line.get_xdata())) for line in axes.lines if len(line.get_xdata()) == 2)  # type: ignore[arg-type]
    assert of_a[0] < 75 < of_a[1] and of_b[0] < 25 < of_b[1]


def test_a_mean_over_seeds_is_of_the_questions_that_all_have(drawn: dict[Path, Figure]) -> None:
    runs = [of_seed("seed-1", "a", 0, 1, 1), of_seed("seed-2", "a", 1, 1, 0, first=1)]
    (axes,) = panels(drawn, "ablation", *runs)

    assert [label.get_text() for label in axes.get_yticklabels()] == ["seed-1, seed-2 (2 seeds)"]
    assert [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1][-1] == 100  # type: ignore[arg-type,index]
    apart = [of_seed("seed-1", "a", 0), of_seed("seed-2", "a", 1, first=1)]
    assert not draw("ablation", apart, "em", Path("none"))


def test_phases_have_a_bar_each(drawn: dict[Path, Figure]) -> None:
    (axes,) = panels(drawn, "time", ONE, OTHER)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one: 0", "one: 1", "one: 2"]
    bars = [(patch.get_x(), patch.get_width()) for patch in axes.patches[::3]]  # type: ignore[attr-defined]
    assert bars == [(0.0, 1.0), (0.0, 2.0), (0.0, 0.5)]


@pytest.mark.parametrize("name", PLOTS)
def test_a_run_without_figures_has_no_plot(drawn: dict[Path, Figure], name: str) -> None:
    assert not draw(
        name, [Reported("new", {"start": None, "iterations": [], "test": {}})], "em", Path("none")
    )
    assert drawn == {}
