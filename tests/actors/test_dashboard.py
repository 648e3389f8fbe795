"""The Grafana dashboard asks for metrics that exist, under labels that they have, and leaves none out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.metrics import Metric, exposed_names

FILE = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "exsearch.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query")


def labels_of(exposed: str) -> set[str]:
    (metric,) = (
        metric
        for metric in Metric.known.values()
        if exposed in {f"ray_{metric.name}{end}" for end in metric.exposed_as}
    )
    return {*metric.labels, "le"} if exposed.endswith("_bucket") else set(metric.labels)


def test_every_row_is_there() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Progress", "Sampling", "Retrieval", "Training", "Push", "Failures"]


@pytest.mark.parametrize("expression", list(expressions()))
def test_an_expression_uses_metrics_that_exist_and_labels_that_they_have(expression: str) -> None:
    used = set(re.findall(r"ray_\w+", expression))
    assert used and used <= exposed_names()
    for name, matchers in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)=~?\"", matchers)) <= labels_of(name)
    for by, name in re.findall(r"by \(([^)]*)\) \((?:rate\()?(ray_\w+)", expression):
        assert set(by.split(", ")) <= labels_of(name)
    assert expression.count("(") == expression.count(")")


def test_legends_show_labels_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target["expr"]


def test_every_metric_is_shown() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"ray_\w+", expression)}
    unseen = [
        metric.name
        for metric in Metric.known.values()
        if not shown & {f"ray_{metric.name}{end}" for end in metric.exposed_as}
    ]
    assert unseen == []


def test_panels_have_room_of_their_own() -> None:
    cells = [
        (panel["gridPos"]["y"], column)
        for panel in PANELS
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
    ]
    assert len(cells) == len(set(cells)) and max(column for _, column in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
