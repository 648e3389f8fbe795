"""Plots of benchmarks: what is drawn, and that the same figures give the same bytes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from bench.measure import Ratio
from bench.plots import Bar, Point, draw_growth, draw_ratios

RATES = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=5)
RATIOS = [
    Ratio("push, shared memory", "memory copy", "MiB", [300.0, 400.0, 320.0], [1000.0, 1000.0, 1000.0], 0.5),
    Ratio("scoring", "a pass over the whole text", "answers", [400.0], [100.0], 3.0),
]
POINTS = [
    Point(100, 100, 20_000, {"E-step": 15.0, "M-step": 8.0}, {"driver": 700.0, "learner": 1500.0}),
    Point(400, 400, 80_000, {"E-step": 60.0, "M-step": 33.0}, {"driver": 710.0, "learner": 1500.0}),
]


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter() if element.text]


@given(ours=RATES, goal=st.floats(0.01, 10.0))
def test_a_bar_spans_its_ratios_and_survives_its_file(ours: list[float], goal: float) -> None:
    ratio = Ratio("what", "limit", "tokens", ours, [2.0] * len(ours), goal)

    bar = Bar.of(Ratio.from_json(ratio.as_json()))

    assert bar == Bar.of(ratio)
    assert bar.lowest <= bar.median <= bar.highest
    assert ("missed" in bar.note) is (round(bar.median, 2) < round(goal, 2))


def test_a_plot_of_ratios_names_rows_medians_and_missed_goals(tmp_path: Path) -> None:
    draw_ratios(RATIOS, tmp_path / "speed.svg")

    shown = " ".join(texts(tmp_path / "speed.svg"))
    assert "push, shared memory" in shown and "scoring" in shown
    assert "0.32, goal 0.5, missed" in shown
    assert "4.00, goal 3" in shown and "4.00, goal 3, missed" not in shown


def test_a_plot_of_growth_names_sizes_phases_and_processes(tmp_path: Path) -> None:
    draw_growth(POINTS, "questions", tmp_path / "growth.svg")

    shown = texts(tmp_path / "growth.svg")
    assert {"questions", "100", "400", "E-step", "M-step", "driver", "learner", "linear"} <= set(shown)


def test_the_same_figures_give_the_same_bytes_without_a_date(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_ratios(RATIOS, tmp_path / name / "speed.svg")
        draw_growth(POINTS, "questions", tmp_path / name / "growth.svg")

    for file in ("speed.svg", "growth.svg"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert first == second
        assert b"<dc:date>" not in first
