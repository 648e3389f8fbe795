"""A headless Chromium for tests of pages: driven over the pipe of its DevTools, so that nothing but it is needed."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")
_FLAGS = ("--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe")  # fmt: skip
_ANSWER_S, _WAIT_S, _LOOK_S = 60.0, 60.0, 0.05
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, " ": 32}
_TEXT_OF = {"Enter": "\r", " ": " "}
_FOCUSED = "document.activeElement"


class PageError(AssertionError):
    """A script of the page failed, or something did not come."""


class Browser:
    """`running` makes one. Its pages answer one caller at a time."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers, self._rest = itertools.count(1), b""
        self._pages: dict[str, Page] = {}

    def open(self, url: str = "about:blank") -> Page:
        """A page of its own, with the window of a desk."""
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            page.ask(f"{domain}.enable")
        page.look_like(1280, 900)
        if url != "about:blank":
            page.go(url)
        return page

    def ask(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> Any:
        """What a command of the DevTools protocol answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters or {}}
        text = json.dumps(message | ({"sessionId": session} if session else {}))
        os.write(self._commands, text.encode() + b"\0")
        until = time.monotonic() + _ANSWER_S
        while True:
            answer = self._next(until)
            if "sessionId" in answer:
                self._pages[answer["sessionId"]].note(answer)
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, until: float) -> Any:
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise PageError("the browser does not answer")
            if not (found := os.read(self._answers, 1 << 16)):
                raise PageError("the browser has ended")
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class Page:
    """A tab. `errors`: what its scripts threw, and what the browser refused to load or to run."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.errors: list[Any] = []

    def ask(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        return self._browser.ask(method, parameters, self._session)

    def note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(event["params"]["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                self.errors.append(entry)

    def go(self, url: str) -> None:
        """Load it; what follows the # alone changes the page in place."""
        self.ask("Page.navigate", {"url": url})

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript; of a promise what it comes to.

        Raises:
            PageError: it throws.
        """
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.ask("Runtime.evaluate", asked)
        if found := answer.get("exceptionDetails"):
            raise PageError(found.get("exception", {}).get("description", found["text"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The first value of an expression that JavaScript takes for true. It may throw until then.

        Raises:
            PageError: there is none for a minute; says what the page shows in place of it.
        """
        until, error = time.monotonic() + _WAIT_S, ""
        while time.monotonic() < until:
            try:
                if (found := self.evaluate(f"({expression}) || null")) is not None:
                    return found
            except PageError as failure:
                error = f" ({failure})"
            time.sleep(_LOOK_S)
        raise PageError(f"{expression} never came{error}; the page shows: {self.text()}; {self.errors}")

    def wait_for_text(self, text: str) -> None:
        self.wait_for(f"document.body.innerText.includes({json.dumps(text)})")

    def text(self, selector: str = "body") -> str:
        """The words of the page, or of an element, as a reader has them, all in a line."""
        return " ".join(str(self.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''")).split())

    def type(self, text: str) -> None:
        """Where the focus is."""
        self.ask("Input.insertText", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys of the keyboard, as `KeyboardEvent.key` names them."""
        for key in keys:
            about = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
            if key in _TEXT_OF:
                about |= {"text": _TEXT_OF[key]}
            self.ask("Input.dispatchKeyEvent", {"type": "keyDown", **about})
            self.ask("Input.dispatchKeyEvent", {"type": "keyUp", **about})

    def look_like(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether the reader wants dark pages."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", {"features": [scheme]})

    def overflow(self) -> int:
        """Pixels that the page is wider than its window."""
        return int(self.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def focus(self) -> dict[str, Any]:
        """Of what has the focus `tag`, `text`, and whether one `sees` it: a line around it."""
        found: dict[str, Any] = self.evaluate(
            f"""({{tag: {_FOCUSED}.tagName, text: ({_FOCUSED}.innerText ?? "").trim(),
                   sees: getComputedStyle({_FOCUSED}).outlineStyle !== "none"
                     && parseFloat(getComputedStyle({_FOCUSED}).outlineWidth) > 0}})"""
        )
        return found

    def named(self) -> list[tuple[str, str]]:
        """Role and name of all that assistive technology is told of the page, in its order."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and "role" in node
        ]


NEED_NAMES = ("link", "button", "textbox", "searchbox", "combobox", "checkbox", "slider", "spinbutton", "region",
              "progressbar", "table", "image", "article", "navigation", "form", "search")  # fmt: skip
"""Roles that say nothing without a name. An article has it of its heading."""


_OBSTACLES = """(() => {
  const found = [];
  const all = (query) => [...document.querySelectorAll(query)];
  const seen = (query) => all(query).filter((element) => element.checkVisibility());
  const expect = (holds, told) => { if (!holds) found.push(told); };

  expect(document.documentElement.lang, "the page names no language");
  expect(document.title, "the page has no title");
  expect(all("main").length === 1, `${all("main").length} main landmarks`);
  expect(seen("h1").length === 1, `${seen("h1").length} headings of the first level`);
  const levels = seen("h1,h2,h3,h4,h5,h6").map((heading) => Number(heading.tagName[1]));
  levels.forEach((level, at) => expect(!at || level <= levels[at - 1] + 1, `a heading ${level} that skips one`));
  const ids = all("[id]").map((element) => element.id);
  ids.forEach((id, at) => expect(ids.indexOf(id) === at, `two elements have the id ${id}`));
  all("img").forEach((image) => expect(image.hasAttribute("alt"), `an image has no alt: ${image.src}`));
  all("table").forEach((table) => expect(table.querySelector("th[scope]"), "a table has no heads"));
  all("[tabindex]").forEach((element) => expect(element.tabIndex <= 0, "an element is out of the order of the focus"));
  seen("main *").forEach((element) => {
    const { overflowX, overflowY } = getComputedStyle(element);
    const hides = (overflow, size, shown) => ["auto", "scroll"].includes(overflow) && size > shown + 1;
    const scrolls = hides(overflowY, element.scrollHeight, element.clientHeight)
      || hides(overflowX, element.scrollWidth, element.clientWidth);
    expect(!scrolls || element.tabIndex === 0, `${element.tagName} ${element.className} scrolls, but not by keyboard`);
  });
  return found;
})()"""


def obstacles(page: Page) -> list[str]:
    """What keeps people out who do not see the page, in words; empty if nothing does that a program can find."""
    nameless = [role for role, name in page.named() if role in NEED_NAMES and not name.strip()]
    found: list[str] = page.evaluate(_OBSTACLES)
    return [*(f"a {role} has no name" for role in nameless), *found]


# It takes commands from its file 3 and answers on 4.
_START = """if True:
    import fcntl, os, sys
    files = [fcntl.fcntl(int(file), fcntl.F_DUPFD, 5) for file in sys.argv[1:3]]
    os.dup2(files[0], 3)
    os.dup2(files[1], 4)
    os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def running(profile: Path) -> Iterator[Browser]:
    """A Chromium, which ends with the block; `profile` is a folder for it."""
    assert CHROMIUM is not None
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    start = [sys.executable, "-c", _START, str(to_read), str(to_write)]
    command = [*start, CHROMIUM, *_FLAGS, *sandbox, f"--user-data-dir={profile}"]
    with subprocess.Popen(
        command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(commands, answers)
        finally:
            os.close(commands)  # which ends it
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            os.close(answers)
