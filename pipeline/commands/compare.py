"""Two evaluations of the same questions against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core.comparison import compare, pair_up
from pipeline.core.errors import UserError
from pipeline.core.question_scores import Scores, read_scores
from pipeline.core.report import EVALUATION, best_iteration
from pipeline.core.run import Json, RunFiles
from pipeline.core.tables import METRIC_NAMES, comparison_table, narrow_table
from pipeline.methods import load

BEST = "best"


def compare_runs(a: Path, b: Path, split: str, models: tuple[str, str], samples: int, seed: int) -> Json:
    """How the second one differs from the first on the questions that both have answered.

    Args:
        a, b: run directories, or tables that `exsearch evaluate --out` wrote (.parquet).
        split: test or dev.
        models: which of each run's models: of test the name of a test, of dev the number of an iteration, or `best`.

    Returns:
        `{"a", "b": {"run", "model"}, "split", ...}` and what `comparison.compare` gives. Two tables do not say of which
        split they are.

    Raises:
        UserError: nothing to compare is there, or the questions are not the same.
    """
    if split not in ("test", "dev"):
        raise UserError(f"--split is {split}; choose test or dev")
    found = [_scores(path, split, model) for path, model in zip((a, b), models, strict=True)]
    names = (f"A ({a})", f"B ({b})")
    (first, of_a), (second, of_b) = found
    return {
        "a": {"run": str(a), "model": of_a},
        "b": {"run": str(b), "model": of_b},
        "split": split if of_a or of_b else None,
        **compare(first, pair_up(first, second, names), samples, seed),
    }


def _scores(path: Path, split: str, model: str) -> tuple[Scores, str]:
    """Scores by question, and the name of the model that they are of."""
    if path.suffix == ".parquet":
        if model != BEST:
            raise UserError(
                f"{path} is a table of one model; leave out --model-a or --model-b ({model}) for it"
            )
        return _read(path, path), ""
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run directory (it has no config.yaml) nor a table of exsearch evaluate --out "
            "(.parquet)"
        )
    run = RunFiles(path)
    run.check_layout()
    model = _best(run) if split == "dev" and model == BEST else model
    step = f"{model}/{EVALUATION}" if split == "dev" else f"test/{model}"
    if (split == "dev" and not model.isdecimal()) or run.finished(step) is None:
        known = sorted(run.test_results()) if split == "test" else _evaluated(run)
        there = f"there are {', '.join(map(str, known))}" if known else "there is none yet"
        raise UserError(f"{path} has no {split} evaluation {model!r}; {there}")
    return _read(run.at(f"{step}.parquet"), path), f"iteration {model}" if split == "dev" else model


def _best(run: RunFiles) -> str:
    """The iteration that the run's own configuration selects."""
    return str(best_iteration(run, load(run.path / "config.yaml").of_recipe))


def _evaluated(run: RunFiles) -> list[int]:
    return sorted(int(path.parent.name) for path in run.path.glob(f"iterations/*/{EVALUATION}.json"))


def _read(table: Path, given: Path) -> Scores:
    scores = read_scores(table)
    if scores is None:
        what = f"there is no {table}" if not table.is_file() else f"{table} was written by an earlier version"
        raise UserError(
            f"{given} holds no scores by question: {what}; score its model again with exsearch evaluate --out "
            "FILE.json, and compare FILE.parquet"
        )
    return scores


def print_comparison(found: Mapping[str, Any], console: Console, changed: int) -> None:
    """Tables for a person, and the first `changed` questions that the models answer differently."""
    a, b = (" ".join(filter(None, found[side].values())) for side in ("a", "b"))
    console.print(f"A: {a}\nB: {b}", markup=False, highlight=False, soft_wrap=True)
    overall = {METRIC_NAMES[name]: row for name, row in found["all"].items()}
    title = " ".join(filter(None, (found["split"], "questions, in percent")))
    console.print(comparison_table(title, "metric", overall))
    for title, key in (("hops", "by_hops"), ("type", "by_type")):
        rows = {name: metrics["em"] for name, metrics in found[key].items()}
        if rows:
            console.print(comparison_table(f"EM by {title}", title, rows))
    console.print(
        "p: McNemar's exact test of EM and accuracy, a paired bootstrap of F1 and recall; 95 % of B - A;\n"
        "gained, lost: questions on which B is better, worse",
        highlight=False,
        soft_wrap=True,
    )
    if found["changed"]:
        console.print(_changed_table(found["changed"], changed))


def _changed_table(rows: list[Json], most: int) -> Table:
    half = most // 2
    gained, lost = ([row for row in rows if row["change"] == change] for change in ("gained", "lost"))
    # Of both kinds, and what one has too few of the other fills.
    of_gained = gained[: max(half, most - len(lost))]
    shown = [*of_gained, *lost[: most - len(of_gained)]]
    table = narrow_table(f"{len(rows)} questions changed, {len(shown)} are shown", "question", ())
    for name in ("gold", "A", "B", "EM"):
        table.add_column(name, overflow="fold")
    for row in shown:
        cells = (row["question"], row["gold_answers"][0], row["a"], row["b"])
        table.add_row(*(escape(cell) for cell in cells), row["change"])
    return table
