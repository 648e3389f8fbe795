"""Instructed retrieval over a registry of tasks (`exsearch benchmark`): the table, from the report alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core.benchmarks.running import REPORT_FILE, run_benchmark
from pipeline.core.benchmarks.spec import read_benchmark
from pipeline.core.benchmarks.summary import DOMAINS, QUERIES, TASKS
from pipeline.core.display import Display
from pipeline.core.run import Json
from pipeline.core.shipped import find_shipped
from pipeline.core.tables import narrow_table, number

_MEANS = {TASKS: "mean of tasks", DOMAINS: "mean of domains", QUERIES: "mean of queries"}
_SHORT = {"ndcg": "N", "precision": "P", "recall": "R", "all_gold": "C", "mrr": "MRR"}
"""As ToolRet's tables have them."""
_COUNTED = {
    "without_instruction": "queries have no instruction, and are asked alike in both arms",
    "without_relevant": "queries have no relevant passage, and count as 0",
    "relevant_not_in_corpus": "relevant passages are not in the corpus, and cannot be found",
    "unjudged": "queries of the file are not judged, and not asked",
    "unknown": "judged queries are not in the file",
    "not_drawn": "queries were not drawn (limit)",
    "left_out": "questions are left out: no constraint parts their responses",
}


def benchmark(which: str, settings: Sequence[str], out: Path | None, display: Display) -> Json:
    """Run a benchmark, or what is left of it; returns its report, which is in `out` as well.

    Raises:
        UserError, RetrieverError: see `run_benchmark`.
    """
    path = find_shipped("benchmarks", which)
    folder = out or Path("runs/benchmarks") / path.stem
    report = run_benchmark(read_benchmark(path, settings), folder, display)
    display.line(f"report: {folder / REPORT_FILE}")
    return report


def print_benchmark(report: Mapping[str, Any], console: Console) -> None:
    """One table of the first measure; a second one of the others, where there are any; what was counted."""
    arms, measures = report["arms"], report["measures"]
    columns = ["n", *(f"{arm} (95 %)" for arm in arms), *(["difference (95 %)"] if len(arms) > 1 else [])]
    table = narrow_table(f"{report['title']}: {measures[0]}, in percent", "", columns)
    for retriever, figures in report["retrievers"].items():
        table.add_row(f"[bold]{escape(retriever)}[/bold]")
        for name, figures_of in _scopes(report, figures):
            table.add_row(escape(name), *_main_cells(figures_of, arms, measures[0]))
        table.add_section()
    console.print(table)
    if len(measures) > 1:
        console.print(_others(report))
    for retriever, figures in report["retrievers"].items():
        if figures["gains"] is not None:
            _print(console, f"{retriever}: {_gains(figures['gains'])}")
    for line in _counted(report):
        _print(console, line)


def _others(report: Mapping[str, Any]) -> Table:
    table = narrow_table("all measures, in percent", "", [_short(measure) for measure in report["measures"]])
    for retriever, figures in report["retrievers"].items():
        table.add_row(f"[bold]{escape(retriever)}[/bold]")
        for name, of in _scopes(report, figures):
            for arm in (arm for arm in report["arms"] if arm in of):
                label = f"{name}, instructed" if arm == "with" else name
                table.add_row(escape(label), *(number(of[arm][measure]) for measure in report["measures"]))
        table.add_section()
    return table


def _short(measure: str) -> str:
    name, _, k = measure.partition("@")
    return f"{_SHORT[name]}@{k}"


def _scopes(report: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for domain, of_domain in figures["domains"].items():
        for task, of_task in figures["tasks"].items():
            if report["tasks"][task]["domain"] == domain:
                yield f"  {task}", of_task
        yield domain, of_domain
    if len(figures["tasks"]) > 1:
        yield from ((name, figures["means"][key]) for key, name in _MEANS.items())


def _main_cells(figures: Mapping[str, Any], arms: Sequence[str], measure: str) -> Iterator[str]:
    yield f"{max(figures[arm]['queries'] for arm in arms if arm in figures):,}"
    for arm in arms:
        of_arm = figures.get(arm)
        yield "" if of_arm is None else "{:.1f} ({:.0f}-{:.0f})".format(of_arm[measure], *of_arm["interval"])
    difference = figures.get("difference")
    if len(arms) > 1 and difference is not None:
        yield "{:+.1f} ({:+.1f} to {:+.1f})".format(difference["difference"], *difference["interval"])


def _gains(gains: Mapping[str, int]) -> str:
    return (
        f"with instructions {gains['gained']} of {gains['tasks']} tasks gain ({gains['gained_surely']} with an "
        f"interval above 0), {gains['lost']} lose ({gains['lost_surely']}), {gains['equal']} stay"
    )


def _counted(report: Mapping[str, Any]) -> Iterator[str]:
    alone = [
        task for task, counts in report["tasks"].items() if counts["without_instruction"] == counts["queries"]
    ]
    if alone and len(report["arms"]) > 1:
        yield (
            f"{len(alone)} of {len(report['tasks'])} tasks have no instructions, and are in no mean of the arm with: "
            f"{', '.join(alone)}"
        )
    for key, words in _COUNTED.items():
        named = {task: counts[key] for task, counts in report["tasks"].items() if counts[key]}
        if named:
            yield f"{sum(named.values()):,} {words}: {', '.join(f'{task} {count:,}' for task, count in named.items())}"
    cells = report["cells"]
    yield (
        f"rankings: {cells['searched']} made now, {cells['kept']} kept"
        + (
            f"; of those made {cells['outdated']} again, for what they were made of has changed"
            if cells["outdated"]
            else ""
        )
    )


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
