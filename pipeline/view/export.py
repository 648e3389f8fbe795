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
from pipeline.view import STATIC
from pipeline.view.pages import Pages
from pipeline.view.stored import NoSuchPage
from retriever_service.files import telling_of_full_disk

_SERVED, _EXPORTED = 'content="served"', 'content="files"'


def export(pages: Pages, out: Path, on_progress: Callable[[int, int], None]) -> int:
    """Write all pages; returns how many pages of data there are.

    Raises:
        UserError: `out` is there already or in a run, a file of the runs is damaged, or a run went on meanwhile.
        RetrieverError: the disk is full.
    """
    given, out = out, out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--export {given} is there already; name a folder that is not, or an empty one")
    if inside := [run for run in pages.paths if run in out.resolve().parents]:
        raise UserError(f"--export {given} is inside of the run {inside[0]}; name a folder beside it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with telling_of_full_disk(out):
            names = list(pages.names())
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
    except NoSuchPage as error:
        raise UserError(
            f"a run went on while it was written ({error}); try again, or when it has ended"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(names)
