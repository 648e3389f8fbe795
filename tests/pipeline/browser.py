"""A headless Chromium that a test drives, over its remote-debugging pipe."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # fmt: skip
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")
WAIT_S = 120.0
"""Bound of every wait, in seconds; none should come near it."""
_FREE = 10
"""Pipes have numbers from here: the shell puts them where Chromium looks, at 3 and 4."""


class Browser:
    """One Chromium. Its commands are those of the DevTools protocol."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._unread = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        """What was told beside the answers, by all pages."""

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "result" in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> Page:
        """A new page, with what `url` loads."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")
        return page

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._back], [], [], WAIT_S)[0], "Chromium does not answer"
            read = os.read(self._back, 2**16)
            assert read, "Chromium has ended"
            self._unread += read
        first, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """Of an expression in JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until it holds."""
        limit = time.monotonic() + WAIT_S
        while not self.value(expression):
            assert time.monotonic() < limit, f"it never came true: {expression}; {self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What stands there for people, what is folded left out."""
        return str(self.value(f"document.querySelector({selector!r}).innerText"))

    def type(self, text: str) -> None:
        """Where the focus is."""
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def look(self, width: int, scheme: str) -> None:
        """As on a screen of this width, in colours `light` or `dark`."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Exceptions that nobody caught, and what the browser refused to load or to run."""
        self.value("0")  # what was told before this has been read
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [event for event in mine if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in mine if event["method"] == "Log.entryAdded"]
        return [
            *thrown,
            *(entry for entry in logged if entry["level"] == "error" and entry["source"] != "network"),
        ]


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A Chromium until the block ends."""
    assert CHROMIUM is not None
    (theirs_in, to), (back, theirs_out) = _pipe(), _pipe()
    command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    for end in (theirs_in, theirs_out):
        os.close(end)
    try:
        browser = Browser(to, back)
        yield browser
        browser.call("Browser.close")
        process.wait(WAIT_S)
    finally:
        process.kill()
        process.wait()
        for end in (to, back):
            os.close(end)


def _pipe() -> tuple[int, int]:
    """To read from, and to write to."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FREE) for end in low)
    for end in low:
        os.close(end)
    return read, write
