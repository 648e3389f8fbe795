"""Runs in a browser: served, or written as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.display import Display
from pipeline.view.export import export
from pipeline.view.pages import Pages
from pipeline.view.server import serve
from retriever_service.service.hosts import check_names


def view(runs: Sequence[Path], host: str, port: int, allowed_hosts: Sequence[str], display: Display) -> None:
    """Serve until Ctrl-C.

    Args:
        allowed_hosts: names that the server answers to beside its own.

    Raises:
        UserError: one of the directories holds no run.
        RetrieverError: the address cannot be listened on, or no host has such a name.
    """
    check_names(allowed_hosts)
    pages = Pages(runs, live=True)
    serve(
        pages,
        host,
        port,
        allowed_hosts,
        lambda url: display.line(f"open {url} in a browser; Ctrl-C ends it"),
    )


def export_view(runs: Sequence[Path], out: Path, display: Display) -> None:
    """Write all pages into a folder.

    Raises:
        UserError: one of the directories holds no run, or the folder is not empty.
        RetrieverError: the disk is full.
    """
    pages = Pages(runs, live=False)
    with display.progress("writing pages", None, "pages") as advance:
        count = export(pages, out, advance.to)
    display.line(f"{count:,} pages of data; open {out / 'index.html'} in a browser")
