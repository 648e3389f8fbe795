"""The page for people in a real browser: a headless Chromium asks an agent that plays a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from pipeline.core.records import Step, StopReason
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit
from tests.pipeline.browser_support import NEEDS_CHROMIUM, Browser, Page, running
from tests.pipeline.serve_support import QUESTION, Running, StandIn, serving, trajectory_of

pytestmark = [pytest.mark.component, NEEDS_CHROMIUM]

READY = "!document.getElementById('send').disabled"
IDLE = "document.getElementById('stop').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    opened = browser.open(server.url)
    opened.wait_for(READY)
    yield opened
    assert opened.errors == []


def ask(page: Page, question: str, times: int = 1) -> None:
    """By the keyboard; the answer is the page's `times`-th when this returns."""
    page.evaluate("document.getElementById('question').focus()")
    page.type(question)
    page.press("Enter")
    page.wait_for(f"document.querySelectorAll('article').length === {times} && {IDLE}")


def test_a_question_shows_its_steps_its_answer_and_what_it_comes_from(page: Page, server: Running) -> None:
    server.agent.go_on.clear()
    page.evaluate("document.getElementById('question').focus()")
    page.type(QUESTION)
    page.press("Enter")
    page.wait_for("document.querySelectorAll('article ol > li').length >= 6")
    steps = page.text("article details")
    for words in ("Thinks: Who makes the Silver Harp?", "Silver Harp", "Writes down: Mara Velin"):
        assert words in steps, words
    assert (page.text("#state"), page.evaluate(IDLE)) == ("The agent is at work.", False)

    server.agent.go_on.set()
    page.wait_for(f"{READY} && {IDLE}")
    assert (page.text("article h2"), page.text("article .answer")) == (QUESTION, "Mara Velin")
    assert page.text("#model") == "exsearch, version 1"
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.evaluate("[...document.querySelectorAll('mark')].map((mark) => mark.textContent)") == [
        "Mara  Velin",
        "The Silver Harp is made by Orvane",
    ]
    assert page.evaluate("document.querySelector('blockquote').textContent") == (
        "Orvane was founded by Mara  Velin in 1984."
    )

    ask(page, "And when?", times=2)
    assert server.agent.asked[-1][0] == f"{QUESTION}\nAnswer: Mara Velin\nQuestion: And when?"


def test_a_question_without_an_answer_says_so_and_is_left_out_of_what_follows(
    page: Page, server: Running
) -> None:
    server.agent.outcome = trajectory_of("", StopReason.STEP_LIMIT)
    ask(page, "Who is nobody?")
    assert page.text("article .answer") == "(no answer)"
    assert "stopped: step_limit" in page.text("article")

    server.agent.outcome = trajectory_of()
    ask(page, QUESTION, times=2)
    assert server.agent.asked[-1][0] == QUESTION


def test_a_failure_is_shown_and_the_question_can_be_put_again(page: Page, server: Running) -> None:
    server.agent.outcome = trajectory_of("", StopReason.ENGINE_ERROR)
    ask(page, QUESTION)
    assert "the engine failed" in page.text("article .bad")
    assert page.evaluate("document.getElementById('question').value") == QUESTION

    server.agent.outcome = trajectory_of()
    page.wait_for(READY)
    page.press("Enter")
    page.wait_for(f"document.querySelectorAll('article').length === 2 && {IDLE}")
    assert page.text("article:last-child .answer") == "Mara Velin"
    assert server.agent.asked[-1][0] == QUESTION


class SlowToStart(StandIn):
    def __init__(self) -> None:
        super().__init__()
        self.may_start = threading.Event()

    async def start(self) -> int:
        while not self.may_start.is_set():
            await asyncio.sleep(0.005)
        return await super().start()


def test_while_the_model_is_loaded_the_page_says_so_and_then_asks(browser: Browser) -> None:
    agent = SlowToStart()
    with serving(agent, ready=False) as server:
        page = browser.open(server.url)
        page.wait_for("document.getElementById('state').textContent.includes('the model is being loaded')")
        assert not page.evaluate(READY)
        agent.may_start.set()
        page.wait_for(READY)
        assert (page.text("#state"), page.text("#model")) == ("", "exsearch, version 1")
        ask(page, QUESTION)
        assert page.text("article .answer") == "Mara Velin"


def test_a_server_that_wants_a_token_is_given_it(browser: Browser) -> None:
    with serving(token="secret") as server:
        page = browser.open(server.url)
        page.wait_for("!document.getElementById('access').hidden")
        page.evaluate("document.getElementById('token').focus()")
        page.type("secret")
        page.press("Enter")
        page.wait_for(f"{READY} && document.getElementById('access').hidden")
        ask(page, QUESTION)
        assert page.text("article .answer") == "Mara Velin"


def test_nothing_is_wider_than_the_screen_in_light_and_dark(page: Page, server: Running) -> None:
    long = "Oberammergauer" * 20
    hit = Hit(Passage("p1", long, f"{long} {long}"), 0.9)
    server.agent.outcome = trajectory_of(long, steps=(Step(long, (hit,), record=long),))
    ask(page, long)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    backgrounds = set()
    for width in (320, 390, 1280):
        for dark in (False, True):
            page.look_like(width, 800, dark=dark)
            assert page.evaluate("innerWidth") == width
            assert page.overflow() <= 0, (width, dark)
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
