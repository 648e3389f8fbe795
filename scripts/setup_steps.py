"""What pip is doing, in a few lines: `pip install ... | setup_steps.py`, for `make setup`.

A person sees that it moves, and the log of a job stays short: a line for each large download, and one every 15 seconds.
"""

from __future__ import annotations

import re
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

EVERY_S = 15.0
LARGE_MB = 50.0
"""Of a download that is worth a line."""
_NEXT = re.compile(r"(?:Collecting|Processing|Requirement already satisfied:) (\S+)")
_DOWNLOAD = re.compile(r"\s*Downloading (\S+) \(([\d.]+) MB\)")
_INSTALLING = "Installing collected packages: "


class Steps:
    """Lines of pip's in, what is worth saying out.

    Args:
        installed: how many packages pip has put in place.
    """

    def __init__(self, say: Callable[[str], None], installed: Callable[[], int]) -> None:
        self._say, self._installed = say, installed
        self._found, self._at, self._installing = 0, "", 0

    def saw(self, line: str) -> None:
        """The next line."""
        if match := _NEXT.match(line):
            self._found, self._at = self._found + 1, unquote(match[1].rpartition("/")[2])
        elif (match := _DOWNLOAD.match(line)) and float(match[2]) >= LARGE_MB:
            self._say(f"  downloading {unquote(match[1].rpartition('/')[2])} ({match[2]} MB)")
        elif line.startswith(_INSTALLING):
            self._installing = line.count(",") + 1
            self._say(f"  all are here; installing {self._installing}")

    def tell(self, seconds: float) -> None:
        """Where it is now, so long after the begin. One package may take longer than the time between two lines."""
        after = f"after {seconds:.0f} s"
        if self._installing:
            self._say(f"  {self._installed()} of {self._installing} installed {after}")
        elif self._found:
            self._say(f"  {self._found} looked at {after}, now {self._at}")


def _installed_since(begin: float) -> int:
    folders = Path(sysconfig.get_path("purelib")).glob("*.dist-info")
    return sum(folder.stat().st_mtime >= begin for folder in folders)


def main() -> None:
    """Reads standard input to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pip, and with it what there is to read
    begin, ended = time.time(), threading.Event()
    steps = Steps(lambda line: print(line, flush=True), lambda: _installed_since(begin))

    def keep_telling() -> None:
        while not ended.wait(EVERY_S):
            steps.tell(time.time() - begin)

    teller = threading.Thread(target=keep_telling)
    teller.start()
    try:
        for line in sys.stdin:
            steps.saw(line)
    finally:
        ended.set()
        teller.join()


if __name__ == "__main__":
    main()
