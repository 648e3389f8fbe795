"""The pages in a real browser: exported files, and a server of a run that goes on."""

from __future__ import annotations

import fcntl
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import uvicorn

from pipeline.core.records import Example
from pipeline.core.run import write_json
from pipeline.view import STATIC
from pipeline.view.export import export
from pipeline.view.pages import Pages
from pipeline.view.server import create_app
from retriever_service.service.listening import listen, url_of
from tests.pipeline.browser_support import NEEDS_CHROMIUM, Browser, Page, obstacles, running
from tests.pipeline.view_support import HOSTILE, Writer, asked

pytestmark = [pytest.mark.component, NEEDS_CHROMIUM]
QUESTION = f"/run/0/question/0001-rollouts/{quote('q0/ä?#', safe='')}"
PHONE = (360, 740)


def group(em: float) -> dict[str, object]:
    return {"n": 5, "em": em, "em_interval": [em - 5, em + 5], "f1": em, "gold_recall": None}


REPORT = {
    "iterations": [
        {"iteration": 1, "dev": {**group(30), "by_hops": {"1": group(31), "2": group(29)}, "by_type": {}}},
        {"iteration": 2, "dev": {**group(40), "by_hops": {"1": group(41), "2": group(39)}, "by_type": {}}},
    ],
    "best_iteration": 2,
    "test": {"best": {**group(50), "by_hops": {}, "by_type": {"bridge": group(52)}}},
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    found = browser.open()
    yield found
    assert found.errors == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    runs = [Writer(folder / name, asked(5)) for name in ("one", "two")]
    for number, writer in enumerate(runs):
        writer.sampled(1)
        writer.evaluated("test/best", "11000" if number else "10100")
        write_json(writer.path / "report.json", REPORT)
    export(Pages([writer.path for writer in runs], live=False), folder / "out", lambda done, total: None)
    return folder / "out"


def opened(page: Page, exported: Path, address: str) -> str:
    """The words of the page, hidden ones too."""
    page.go(f"file://{exported}/index.html#{address}")
    page.wait_for("document.querySelector('main h1')")
    page.wait_for("!document.querySelector('main').innerText.includes(' read)')")
    assert "cannot be shown" not in page.text(), page.text()
    return " ".join(str(page.evaluate("document.querySelector('main').textContent")).split())


def test_runs_beside_each_other(page: Page, exported: Path) -> None:
    opened(page, exported, "/")
    text = page.text()

    assert "2 runs" in text
    assert re.search(r"one exsearch \S+ .*two exsearch", text)


def test_questions_that_two_runs_answer_differently(page: Page, exported: Path) -> None:
    opened(page, exported, "/run/0/questions/test-best?against=1%2Ftest-best&kind=changed")
    page.wait_for_text("2 of 5 questions, 50.0 % right")
    text = page.text()

    assert re.search(r"Who founded 1\? Ada 1 nobody wrong 100\.0 %", text)
    assert re.search(r"Who founded 2\? Ada 2 Ada 2 right 0\.0 %", text)
    assert "Who founded 0?" not in text


def test_a_question_with_all_that_was_found_and_weighed(page: Page, exported: Path) -> None:
    text = opened(page, exported, QUESTION)
    page.wait_for_text("two: samples of iteration 1")

    for words in (
        "Sample 1 right", "Sample 2 wrong", "88.1 % of the question's weight", "gold answerAda 0",
        "trained: <think> Who founded it? </think>", "written, not trained: <answer> Ada 0 </answer>",
        "1 passages, 1 gold", HOSTILE,
    ):  # fmt: skip
        assert words in text, words


def test_a_question_is_found_without_its_place_and_with_a_wrong_one(page: Page, exported: Path) -> None:
    for where in ("", "?in=000002/0", "?in=gone/7", "?in=..%2F..%2Fruns%2F1"):
        assert "Who founded 0?" in opened(page, exported, QUESTION + where)
        assert page.evaluate(
            "[...document.querySelectorAll('.paging a')].map((link) => link.innerText).join()"
        ) == ("next question")
    page.evaluate("document.querySelector('.paging a').click()")
    page.wait_for("document.querySelector('h1').innerText === 'Who founded 1?'")


def test_the_list_that_a_question_was_chosen_from_says_which_is_next(page: Page, exported: Path) -> None:
    opened(page, exported, "/run/0/questions/test-best?kind=solved&sort=id&down=1")
    page.wait_for_text("2 of 5 questions")
    page.evaluate("document.querySelector('tbody a').click()")
    page.wait_for_text("1 of 2")
    page.evaluate("document.querySelector('.paging a').click()")
    page.wait_for_text("2 of 2")
    assert page.evaluate("document.querySelector('h1').innerText") == "Who founded 0?"


def test_a_question_in_all_runs_side_by_side(page: Page, exported: Path) -> None:
    opened(page, exported, QUESTION)
    page.wait_for_text("side by side")
    page.evaluate(
        "[...document.querySelectorAll('summary')].find((one) => one.innerText === 'side by side').click()"
    )
    page.wait_for_text("with their steps")
    rows = page.evaluate("[...document.querySelectorAll('details tbody')].map((body) => [...body.rows].map("
                         "(row) => [...row.cells].map((cell) => cell.innerText.trim()).join('|')))")  # fmt: skip
    table = next(found for found in rows if any("samples of iteration 1" in row for row in found))

    assert table == [
        f"{run}: samples of iteration 1|{sample}, searcher|{answer}|{verdict}|1|{weight}|{share}|{log}|answered"
        for run in ("one", "two")
        for sample, answer, verdict, weight, share, log in (
            (1, "Ada 0", "right", "1.00", "88.1 %", "0.00"),
            (2, "nobody", "wrong", "0.135", "11.9 %", "-2.00"),
        )
    ]
    page.evaluate(
        "[...document.querySelectorAll('summary')].find((one) => one.innerText === 'with their steps').click()"
    )
    page.wait_for("document.querySelectorAll('section > ol').length === 4")
    assert obstacles(page) == []


def test_scores_by_hops_and_type_of_any_evaluation(page: Page, exported: Path) -> None:
    opened(page, exported, "/run/0")
    assert "test: best, by type, percent" in page.text()
    assert "These questions carry no numbers of hops." in page.text()

    choose = "const select = document.querySelector('select'); select.value = 'dev/1'; select.onchange?.();"
    page.evaluate(f"(() => {{ {choose} select.dispatchEvent(new Event('change')); }})()")
    text = page.text()
    assert "dev, after iteration 1, by hops, percent" in text and "These questions carry no types." in text
    assert "1 5 31.0 26.0 to 36.0" in text


def test_an_address_that_is_none_says_so(page: Page, exported: Path) -> None:
    page.go(f"file://{exported}/index.html#/run/0/question/test-best/nobody")
    page.wait_for_text("there is no question nobody among these")


ADDRESSES = (
    "/",
    "/run/0",
    "/run/0/questions/0001-rollouts",
    "/run/0/questions/test-best?against=1%2Ftest-best",
    QUESTION,
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_keeps_those_out_who_do_not_see_a_page(page: Page, exported: Path, address: str) -> None:
    opened(page, exported, address)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    assert obstacles(page) == []
    roles = {role for role, _ in page.named()}
    assert {"banner", "main", "navigation"} <= roles, roles


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_a_phone_by_day_and_by_night(page: Page, exported: Path, address: str, dark: bool) -> None:
    page.look_like(*PHONE, dark=dark)
    opened(page, exported, address)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    assert page.overflow() <= 0
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(21, 24, 28)" if dark else "rgb(252, 252, 251)")


def test_the_keyboard_goes_through_the_table_and_back(page: Page, exported: Path) -> None:
    opened(page, exported, "/run/0/questions/test-best")
    page.press("Tab")
    seen = [page.focus()]
    while seen[-1]["text"] != "Who founded 1?":
        assert len(seen) < 40, seen
        page.press("Tab")
        seen.append(page.focus())
    assert all(one["sees"] for one in seen), seen
    texts = [one["text"] for one in seen]
    assert texts[-2] == "Who founded 0?" and "searches" in texts, texts

    page.press("Enter")
    page.wait_for("document.querySelector('h1').innerText === 'Who founded 1?'")
    assert page.focus()["tag"] == "MAIN"


def test_to_sort_keeps_the_focus_on_the_head(page: Page, exported: Path) -> None:
    opened(page, exported, "/run/0/questions/test-best")
    page.evaluate("[...document.querySelectorAll('th button')].find((one) => one.innerText === 'EM').focus()")
    for direction, first in (("ascending", "wrong"), ("descending", "right")):
        page.press("Enter")
        assert page.evaluate("document.activeElement.closest('th').ariaSort") == direction
        assert page.evaluate("document.querySelector('tbody tr').cells[3].innerText") == first


# ---------------------------------------------------------------- a run that goes on


@contextmanager
def served(run: Path) -> Iterator[str]:
    with listen("127.0.0.1", 0, backlog=16) as listener:
        app = create_app(Pages([run], live=True), None)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def at_work(run: Path) -> Iterator[None]:
    """As long as a process holds its lock a run goes on."""
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    made = Writer(tmp_path / "run", asked(5))
    made.sampled(1)
    write_json(made.path / "report.json", {"iterations": REPORT["iterations"][:1], "test": {}})  # type: ignore[index]
    return made


def test_a_run_that_goes_on_is_followed_without_a_reload(page: Page, writer: Writer) -> None:
    with at_work(writer.path), served(writer.path) as url:
        page.go(url)
        page.wait_for_text("samples of iteration 1")
        page.evaluate("window.sameDocument = true")
        page.evaluate("document.querySelector('details').open = true")
        page.evaluate("document.querySelector('main a').focus()")
        assert "samples of iteration 2" not in page.text()

        writer.sampled(2)
        write_json(writer.path / "report.json", REPORT)
        page.wait_for_text("samples of iteration 2")
        page.wait_for_text("dev, after iteration 2")
        assert page.evaluate("window.sameDocument")
        assert page.evaluate("document.querySelector('details').open")
        assert page.focus()["text"] == "samples of iteration 1"


def test_a_page_of_questions_offers_what_is_new_and_changes_when_it_is_wanted(
    page: Page, writer: Writer
) -> None:
    writer.sampled(2, shards=1)
    with at_work(writer.path), served(writer.path) as url:
        page.go(f"{url}/#/run/0/questions/0002-rollouts?sort=id")
        page.wait_for_text("2 of 2 questions")
        page.evaluate("document.querySelector('input').focus()")
        writer.sampled(2)
        page.wait_for_text("There is more by now")
        assert "2 of 2 questions" in page.text()
        assert page.focus()["tag"] == "INPUT"

        page.evaluate("document.querySelector('#newer button').click()")
        page.wait_for_text("5 of 5 questions")
        assert "There is more by now" not in page.text()


def test_the_page_of_a_question_offers_the_next_iteration(page: Page, writer: Writer) -> None:
    with at_work(writer.path), served(writer.path) as url:
        page.go(f"{url}/#{QUESTION}")
        page.wait_for_text("Sample 2")
        page.look_like(1280, 300)
        page.evaluate("scrollTo(0, 200)")
        top = "Math.round(document.querySelector('article').getBoundingClientRect().top)"
        before = page.evaluate(top)
        writer.sampled(2)
        page.wait_for_text("There is more by now")
        page.evaluate("document.querySelector('#newer button').click()")
        page.wait_for_text("samples of iteration 2")
        assert page.evaluate(top) == before


def test_what_a_loss_is_told_of_each_token(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Example.of

    def with_more(turn: object, **streams: object) -> Example:
        found = of(turn, **streams)  # type: ignore[arg-type]
        tokens = np.linspace(0.0, 1.0, found.length)
        rows = np.arange(10.0 * found.num_targets).reshape(-1, 10)
        return Example(found.id, found.unit, found.role, found.token_ids, found.loss_mask,
                       {**found.streams, "token_weight": tokens, "reference": rows})  # fmt: skip

    monkeypatch.setattr(Example, "of", with_more)
    writer = Writer(tmp_path / "run", asked(1))
    writer.sampled(1)
    with served(writer.path) as url:
        page.go(f"{url}/#{QUESTION}")
        page.wait_for_text("2 training examples")
        page.evaluate("document.querySelectorAll('summary').forEach((one) => one.click())")
        page.wait_for_text("reference, the first 8 of 10")
        text = page.text()
    assert re.search(r'"<think>" \d\.\d{3} 0\.000 1\.000 2\.000 3\.000 4\.000 5\.000 6\.000 7\.000 ', text), (
        text
    )


# ---------------------------------------------------------------- colours


def colours() -> dict[str, dict[str, tuple[float, ...]]]:
    """The variables of the style sheet by day and by night, as red, green and blue."""
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    day, night = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    return {
        name: {
            key: tuple(int(value[at : at + 2], 16) / 255 for at in (1, 3, 5)) for key, value in found.items()
        }
        for name, found in (("day", day), ("night", day | night))
    }


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """As WCAG 2.2 defines it."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("time", ["day", "night"])
def test_words_stand_out_from_what_is_behind_them(time: str) -> None:
    of = colours()[time]
    words = [
        (name, back) for back in ("back", "card") for name in ("text", "dim", "accent", "good", "bad", "gold")
    ]
    words += [
        ("text", "trained"),
        ("text", "untrained"),
        ("text", "gold-back"),
        ("dim", "gold-back"),
        ("gold", "gold-back"),
    ]
    faint = {
        pair: contrast(of[pair[0]], of[pair[1]]) for pair in words if contrast(of[pair[0]], of[pair[1]]) < 4.5
    }
    assert faint == {}
    lines = {name: contrast(of[name], of["card"]) for name in of if name.startswith("series-")}
    assert len(lines) == 8 and min(lines.values()) >= 3, lines
