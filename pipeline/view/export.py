"""The pages as files, which open from a disk and from any host of files.

DIR/index.html, style.css, *.js     the page
DIR/data/NAME.js                    a page of data (`pipeline.view.pages`), wrapped in a call
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.view.pages import Pages
from pipeline.view.server import STATIC
from retriever_service.files import telling_of_full_disk

_SERVED, _EXPORTED = 'content="served"', 'content="files"'


def export(pages: Pages, out: Path, on_progress: Callable[[int, int], None]) -> int:
    """Write all pages; returns how many pages of data there are.

    Raises:
        UserError: `out` is there already, or a file of the runs is damaged.
        RetrieverError: the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--export {out} is there already; name a folder that is not, or an empty one")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = list(pages.names())
    with telling_of_full_disk(out):
        partial.mkdir(parents=True)
        for file in STATIC.iterdir():
            text = file.read_text(encoding="utf-8")
            (partial / file.name).write_text(text.replace(_SERVED, _EXPORTED), encoding="utf-8")
        for done, name in enumerate(names, start=1):
            path = partial / "data" / f"{name}.js"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(pages.page(name), ensure_ascii=False, allow_nan=False)
            path.write_text(f"ExSearch.data.put({json.dumps(name)}, {content});\n", encoding="utf-8")
            on_progress(done, len(names))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    return len(names)
