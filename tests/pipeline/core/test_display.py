"""What a person reads on the terminal or in the log of a job."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from pipeline.core.display import Display
from pipeline.core.report import Column, Outcome, step_outcome
from pipeline.em_report import outcome_of


class Screen:
    """A display and what it printed; 160 columns, no terminal: as in the log of a job."""

    def __init__(self, width: int = 160) -> None:
        self.display = Display(Console(file=io.StringIO(), width=width))

    @property
    def text(self) -> str:
        file = self.display.console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def row(self, first: str) -> list[str]:
        """What stands behind `first` in the table row that begins with it; empty cells leave no trace."""
        words = first.split()
        (found,) = [line.split() for line in self.text.splitlines() if line.split()[: len(words)] == words]
        return found[len(words) :]


@pytest.fixture
def screen() -> Screen:
    return Screen()


GROUP: dict[str, Any] = {
    "n": 120,
    "em": 50.0,
    "f1": 60.0,
    "accuracy": 55.0,
    "em_interval": [41.2, 58.8],
    "gold_recall": 85.0,
}
SCORES: dict[str, Any] = {
    "n": 200,
    "em": 41.25,
    "f1": 50.0,
    "accuracy": 45.5,
    "em_interval": [35.0, 47.5],
    "gold_recall": 80.0,
    "searches": 2.345,
    "gold_recall_by_step": [55.0, 80.0],
    "stop_reasons": {"answered": 190, "step_limit": 10, "malformed": 0},
    "by_hops": {"2": GROUP},
    "by_type": {"bridge": GROUP | {"gold_recall": None}},
}
WITHOUT_GOLD = SCORES | {"gold_recall": None, "gold_recall_by_step": [], "em_interval": None}


def iteration(number: int, **train: Any) -> dict[str, Any]:
    return {
        "iteration": number,
        "phase_seconds": {"expectation": 12.4, "maximisation": 7.6, "evaluation": 3.0},
        "train": train,
        "learner": {},
        "push": None,
        "dev": SCORES,
    }


BOUND = {
    "likelihood_bound": -4.123,
    "likelihood_bound_stderr": 0.456,
    "effective_sample_size": 2.5,
    "all_failed_share": 12.5,
}


def report(**parts: Any) -> dict[str, Any]:
    return {
        "run": "first",
        "iterations": [iteration(1, **BOUND), iteration(2, **BOUND)],
        "best_iteration": 2,
        "cold_start": iteration(0, trajectories=64),
        "test": {},
    } | parts


def outcome(**parts: Any) -> Outcome:
    return outcome_of(report(**parts))


def test_the_report_shows_each_iteration_and_marks_the_best(screen: Screen) -> None:
    screen.display.outcome(outcome())
    assert "iterations of first" in screen.text
    bound, _, error, *cells = screen.row("1")
    assert (bound, error) == ("-4.12", "0.46")
    assert cells == ["2.50", "12.5", "41.2", "50.0", "2.35", "12", "8"]
    assert screen.row("2")[:2] == ["*", "-4.12"]
    assert screen.row("0, cold") == ["41.2", "50.0", "2.35", "12", "8"]


def test_iteration_0_of_a_run_without_a_cold_start_is_the_base_model(screen: Screen) -> None:
    base = {"iteration": 0, "phase_seconds": {"evaluation": 3.0}, "train": {}, "dev": SCORES}
    screen.display.outcome(outcome(cold_start=base))
    assert screen.row("base") == ["41.2", "50.0", "2.35"]
    assert "0, cold" not in screen.text


def test_another_recipes_report_has_the_columns_that_the_recipe_gives(screen: Screen) -> None:
    rows = [{"iteration": t, "sample": {"pairs": 10 * t}, "a/train": {"loss": 0.5}} for t in (0, 1)]
    made = {
        "run": "r",
        "recipe": "x",
        "start": rows[0],
        "iterations": rows[1:],
        "best_iteration": 1,
        "test": {},
    }
    columns = (Column("pairs", "sample.pairs", 0), Column("loss", "a/train.loss", 2), Column("no", "b.c"))
    screen.display.outcome(step_outcome(made, columns, "pairs: of trajectories"))
    assert screen.row("start") == ["0", "0.50"]
    assert screen.row("1") == ["*", "10", "0.50"]
    assert "pairs: of trajectories" in screen.text


def test_the_report_of_a_run_that_was_stopped_half_way(screen: Screen) -> None:
    half = {"iteration": 1, "phase_seconds": {"expectation": 1.0}, "train": BOUND, "dev": None}
    screen.display.outcome(outcome(iterations=[half], cold_start=None, best_iteration=0))
    assert screen.row("1")[3:] == ["2.50", "12.5", "1"]
    assert "test questions" not in screen.text


def test_a_bound_that_json_cannot_hold_is_shown_as_what_it_is(screen: Screen) -> None:
    impossible = iteration(1, **BOUND | {"likelihood_bound": None, "likelihood_bound_stderr": 0.0})
    screen.display.outcome(outcome(iterations=[impossible], best_iteration=0))
    assert screen.row("1")[:2] == ["-inf", "2.50"]


def test_the_report_shows_the_test_scores_from_the_base_model_to_the_best(screen: Screen) -> None:
    names = ("best", "base", "cold_start", "one_search", "no_search", "another")
    screen.display.outcome(outcome(test=dict.fromkeys(names, SCORES)))
    text = screen.text[screen.text.index("test questions") :]
    order = sorted(names, key=text.index)
    assert order == ["base", "no_search", "one_search", "cold_start", "best", "another"]
    assert screen.row("best") == ["200", "41.2", "35.0-47.5", "50.0", "45.5", "80.0", "2.35"]


PAIRED: dict[str, Any] = {"difference": -12.34, "interval": [-20.0, 1.25], "p_value": 0.0421}
SURE: dict[str, Any] = {
    "by": "em",
    "questions": 300,
    "iterations": [
        {"iteration": 0, "score": 40.0, "probability_best": 0.034, **PAIRED},
        {
            "iteration": 1,
            "score": 52.3,
            "probability_best": 0.966,
            **dict.fromkeys(("difference", "interval", "p_value")),
        },
    ],
}
PAIRS = [
    {
        "a": "base",
        "b": "best",
        "em": PAIRED | {"p_value": 1e-9},
        "f1": PAIRED | {"interval": None, "p_value": None},
    }
]
NEW = BOUND | {
    "likelihood_bound_median": -1.234,
    "likelihood_bound_trimmed": -2.345,
    "mean_likelihood": 0.4321,
    "mean_likelihood_stderr": 0.0123,
    "median_likelihood": 0.2864,
    "global_effective_sample_size": 370.4,
    "weighted_trajectories": 1600,
}


def test_the_report_shows_what_the_bound_hides_and_its_change_on_the_same_questions(screen: Screen) -> None:
    changed = {"likelihood_bound": {"n": 400, "difference": 3.551, "stderr": 0.701, "left_out": 0}}
    rows = [iteration(7, **NEW), iteration(8, **NEW) | {"paired": changed}]
    screen.display.outcome(outcome(iterations=rows, best_iteration=8))
    text = screen.text[screen.text.index("answers of the training questions") :]
    assert [line.split() for line in text.splitlines() if line.split()[:1] in (["7"], ["8"])] == [
        ["7", "-1.23", "-2.35", "0.432", "\u00b1", "0.012", "0.286", "370", "1600"],
        [
            "8",
            "*",
            "3.55",
            "\u00b1",
            "0.70",
            "-1.23",
            "-2.35",
            "0.432",
            "\u00b1",
            "0.012",
            "0.286",
            "370",
            "1600",
        ],
    ]
    assert "ESS all: of all weighted trajectories together" in text


def test_the_report_shows_how_sure_the_choice_is_and_which_models_differ(screen: Screen) -> None:
    screen.display.outcome(
        outcome(test=dict.fromkeys(("base", "best"), SCORES), selection=SURE, paired_tests=PAIRS)
    )
    assert "by EM on 300 dev questions" in screen.text
    assert "median to ESS all: not recorded\n" in screen.text  # BOUND is of an earlier version
    assert "not recorded: " not in screen.text
    text = screen.text[screen.text.index("which iteration is the best") :]
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "40.0", "0.03", "-12.3", "-20.0", "to", "+1.2", "0.042"] in rows
    assert ["1", "*", "52.3", "0.97"] in rows
    assert ["best", "-", "base", "-12.3", "-20.0", "to", "+1.2", "<0.001", "-12.3"] in rows


def test_a_report_says_what_an_earlier_version_did_not_record(screen: Screen) -> None:
    screen.display.outcome(outcome(test=dict.fromkeys(("base", "best"), SCORES)))
    assert "\nnot recorded: how sure the best iteration is, pairs of tests\n" in screen.text


@pytest.mark.parametrize("name", ["outcome", "scores"])
def test_tables_fit_into_80_columns(name: str) -> None:
    screen = Screen(width=80)
    far = {"difference": -100.0, "interval": [-100.0, 100.0], "p_value": 0.5}
    wide = [{"a": "one_search", "b": "cold_start", "em": far, "f1": far}]
    worst = SCORES | {"em": 100.0, "f1": 100.0, "accuracy": 100.0, "em_interval": [100.0, 100.0], "n": 12345}
    row = iteration(1, **NEW | {"likelihood_bound": -123.45, "likelihood_bound_stderr": 10.25})
    row |= {"paired": {"likelihood_bound": {"difference": -123.45, "stderr": 10.25}}}
    row = row | {"phase_seconds": {"expectation": 12345.0, "maximisation": 12345.0}, "dev": worst}
    given = {
        "outcome": outcome(iterations=[row], test={"one_search": worst}, selection=SURE, paired_tests=wide),
        "scores": scored(sets={"hotpotqa/dev.jsonl": worst}, all=worst),
    }
    getattr(screen.display, name)(given[name])
    assert "\u2026" not in screen.text
    assert max(map(len, screen.text.splitlines())) <= 80
    assert "12345" in screen.text
    assert "100.0-100.0" in screen.text


PROTOCOL: dict[str, Any] = {
    "protocol": "hotpotqa",
    "n": 200,
    "predicted": 190,
    "scores": {"em": 41.25, "sp_f1": 33.25},
    "intervals": {"em": [35.0, 47.5], "sp_f1": None},
    "counted": {"em": 200, "sp_f1": 150},
}


def scored(**parts: Any) -> dict[str, Any]:
    return {
        "models": {"searcher": "models/tiny"},
        "split": "dev",
        "sets": {},
        "all": SCORES,
        "protocol": PROTOCOL,
        "coverage": {"all": {"percent": 87.5}},
    } | parts


def test_scores_show_every_set_and_the_breakdown(screen: Screen) -> None:
    screen.display.scores(scored(sets={"a/dev.jsonl": SCORES, "b/dev.jsonl": WITHOUT_GOLD}))
    assert "models/tiny on dev" in screen.text
    assert screen.row("a/dev.jsonl") == ["200", "41.2", "35.0-47.5", "50.0", "45.5", "80.0", "2.35"]
    assert screen.row("b/dev.jsonl") == ["200", "41.2", "50.0", "45.5", "2.35"]
    assert screen.row("all")[:2] == ["200", "41.2"]
    assert screen.row("2") == ["120", "50.0", "41.2-58.8", "60.0", "55.0", "85.0"]
    assert screen.row("bridge") == ["120", "50.0", "41.2-58.8", "60.0", "55.0"]
    assert "stop reasons: answered 190, step_limit 10\n" in screen.text
    assert "gold recall after each search: 55.0, 80.0" in screen.text
    assert "gold passages or answers of 87.5% of the questions are there" in screen.text


def test_the_sets_own_scores_are_shown_with_the_questions_that_they_can_be_told_of(screen: Screen) -> None:
    screen.display.scores(scored())
    assert "as hotpotqa scores them" in screen.text
    assert screen.row("em") == ["200", "41.2", "35.0-47.5"]
    assert screen.row("sp_f1") == ["150", "33.2"]


def test_scores_of_answers_alone_are_not_shown_twice(screen: Screen) -> None:
    screen.display.scores(scored(protocol=PROTOCOL | {"protocol": "nq", "scores": {"em": 41.25}}))
    assert "as nq scores them" not in screen.text


def test_scores_of_a_file_of_predictions_are_without_searches(screen: Screen) -> None:
    answers = {key: value for key, value in SCORES.items() if key not in ("searches", "stop_reasons")}
    screen.display.scores({"predictions": "p[1].json", "all": answers, "protocol": PROTOCOL})
    assert "p[1].json, in percent" in screen.text
    assert screen.row("all") == ["200", "41.2", "35.0-47.5", "50.0", "45.5", "80.0"]
    assert "stop reasons" not in screen.text


def test_scores_without_gold_passages_say_so(screen: Screen) -> None:
    screen.display.scores(scored(all=WITHOUT_GOLD))
    assert "no gold passages named" in screen.text


def test_scores_without_a_search_do_not_blame_the_questions(screen: Screen) -> None:
    screen.display.scores(scored(all={**WITHOUT_GOLD, "searches": 0.0}))
    assert "gold recall after each search: no search was made" in screen.text


@pytest.mark.parametrize("name", ["[bold]dev[/bold].jsonl", "[/dev]", "data[1].jsonl", "[red]"])
def test_names_of_models_files_types_and_runs_are_shown_as_they_are(screen: Screen, name: str) -> None:
    by_type = {name: SCORES["by_type"]["bridge"]}
    screen.display.scores(
        scored(models={"searcher": name}, sets={name: SCORES}, all=SCORES | {"by_type": by_type})
    )
    screen.display.outcome(outcome(run=name))
    assert screen.text.count(name) == 4


@pytest.mark.parametrize("method", ["line", "error"])
def test_messages_are_printed_as_they_are(screen: Screen, method: str) -> None:
    message = "data[0].train: [red]odd[/red] :smile: 3.5 [/x]"
    getattr(screen.display, method)(message)
    assert message in screen.text


def test_a_long_path_in_a_message_stays_in_one_piece() -> None:
    screen, path = Screen(width=40), "/" + "/".join(["folder"] * 20)
    screen.display.error(f"no question file {path}; there are a.jsonl, b.jsonl")
    screen.display.line(f"exsearch evaluate --run {path}")
    assert screen.text.count(path) == 2


def test_a_finished_step_is_one_line_where_there_is_no_terminal(screen: Screen) -> None:
    with screen.display.progress("encoding", 3, "passages") as advance:
        advance(1)
        advance.to(3, 3)
    with screen.display.status("starting vLLM"):
        pass
    lines = screen.text.splitlines()
    assert [line.rsplit(": ", 1)[0] for line in lines] == ["encoding", "starting vLLM"]
    assert all(line.endswith(" s") for line in lines)


def test_progress_counts_what_it_is_told() -> None:
    display = Display(Console(file=io.StringIO(), force_terminal=True, width=160))
    with display.progress("encoding", None, "passages") as advance:
        advance.to(40, 100)
        advance(2)
        advance._progress.refresh()
        assert "42/100" in display.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_step_that_failed_is_not_reported_as_done(screen: Screen) -> None:
    with pytest.raises(RuntimeError), screen.display.status("starting vLLM"):
        raise RuntimeError("no")
    with pytest.raises(RuntimeError), screen.display.progress("encoding", None, "passages"):
        raise RuntimeError("no")
    assert screen.text.strip() == ""


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger without handlers; what it had comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    yield root
    for handler in root.handlers:
        with contextlib.suppress(OSError):
            handler.close()
    root.handlers = handlers
    root.setLevel(level)


def test_the_log_goes_to_a_file_and_warnings_also_to_the_terminal(
    tmp_path: Path, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "one" / "run.log"
    Display().log_to(path)
    logging.getLogger("pipeline.em").info("iteration 1")
    logging.getLogger("pipeline.em").warning("a worker died")
    text = path.read_text(encoding="utf-8")
    assert "INFO pipeline.em: iteration 1" in text
    assert "WARNING pipeline.em: a worker died" in text
    assert capsys.readouterr().err == "WARNING: a worker died\n"


def test_a_log_that_cannot_be_written_is_no_page_of_tracebacks(
    capfd: pytest.CaptureFixture[str], root_logger: logging.Logger
) -> None:
    Display().log_to(Path("/dev/full"))
    logging.getLogger("pipeline.run").warning("a word")
    assert capfd.readouterr().err == "WARNING: a word\n"


def test_a_resumed_run_goes_on_in_its_log(tmp_path: Path, root_logger: logging.Logger) -> None:
    for start in ("first", "second"):
        Display().log_to(tmp_path / "run.log")
        logging.getLogger("pipeline.em").info(start)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["first", "second"]


def test_things_that_go_on_at_once_have_a_line_each_and_end_in_any_order() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = Display(console)
    sampling = display.progress("sampling", 10, "questions", done=2)
    scoring = display.progress("dev", 5, "questions")
    advance, ahead = sampling.__enter__(), scoring.__enter__()
    with display.status("starting the learner"):
        advance.to(7, 10)
        ahead(4)
        bars = display._bars
        assert bars is not None
        bars.refresh()
        seen = Text.from_ansi(str(console.file.getvalue()).split("\r")[-1]).plain  # type: ignore[attr-defined]
        assert [line.split()[1] for line in seen.splitlines()] == ["sampling", "dev", "starting"]
        assert "7/10 questions" in seen and "4/5" in seen
    sampling.__exit__(None, None, None)
    scoring.__exit__(None, None, None)
    assert display._bars is None


def test_the_progress_file_tells_of_what_began_last_and_still_goes_on(tmp_path: Path) -> None:
    display = Display(Console(file=io.StringIO()))

    def told() -> tuple[str, float]:
        phase = json.loads((tmp_path / "progress.json").read_text())["phase"]
        return phase["name"], phase["done"]

    with display.follow(tmp_path), contextlib.ExitStack() as stack:
        advance = stack.enter_context(display.progress("sampling", 10, "questions"))
        with display.progress("training", 3, "steps"):
            advance.to(4, 10)
            assert told()[0] == "training"
        assert told() == ("sampling", 4)
