"""Fetches a data set into a folder:

    train.jsonl, dev.jsonl, test.jsonl      questions, those splits that have answers
    corpus.jsonl                            the paragraphs that questions come with, each once; where they do
    manifest.json                           source, licence, counts, checksums, leaks and coverage; written last

Guarantees: a folder with a manifest is whole. A fetch that was cut off goes on behind its last whole split; a finished
one is not done again, and nothing else is fetched over it. Same source: same files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.data.check import STEP, check_corpus, check_questions
from pipeline.core.data.fetch.catalogue import DATA_SETS, DataSet
from pipeline.core.data.fetch.origin import Origin, find_origin, settings_of
from pipeline.core.data.fetch.rows import Converted, Unusable, convert
from pipeline.core.data.questions import read_questions
from pipeline.core.data.split_names import Split
from pipeline.core.errors import UserError
from retriever_service.files import (
    check_contents,
    exclusive,
    json_object,
    record_file,
    records_as_json,
    records_from_json,
    write_json,
    writing,
)
from retriever_service.passages.corpus import Passage, stream_corpus

Json = dict[str, Any]
OnProgress = Callable[[str, int], None]
"""Told a split and how many of its records were read."""

MANIFEST = "manifest.json"
CORPUS = "corpus.jsonl"
_STATE = ".fetch.json"
_LOCK = ".lock"


def fetch(
    name: str, out: Path, given: str | None, on_progress: OnProgress = lambda split, done: None
) -> Json:
    """Fetch a data set into `out`; returns the manifest.

    Args:
        given: a folder with a local copy, `hf:NAME[:CONFIG]`, or None for the data set's place on the hub.

    Raises:
        UserError, RetrieverError: no such data set, nothing to fetch from, a record that is none, a folder that holds
            something else, or a hub that does not answer.
    """
    if name not in DATA_SETS:
        raise UserError(f"there is no data set {name} to fetch; there are {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    origin = find_origin(data_set, given)
    settings = settings_of(data_set, origin)
    _check_is_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / _LOCK):
        if (manifest := _read(out / MANIFEST)) is not None:
            return _finished(out, manifest, settings)
        state = _begun(out, settings)
        for split in origin.sources:
            if split not in state["splits"]:
                counts = _Split(data_set, origin, split, out, on_progress).write()
                state["splits"][split] = counts
                write_json(out / _STATE, state)
        return _finish(out, data_set, state)


def _check_is_ours(out: Path) -> None:
    ours = (MANIFEST, _STATE, _LOCK)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new or an empty folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise UserError(f"{out} holds something else; name a new or an empty folder")


def _finished(out: Path, manifest: Json, settings: Json) -> Json:
    _check_same(out, manifest["settings"], settings)
    for name, record in records_from_json(manifest.get("files", {})).items():
        check_contents(out / name, record, "remove the folder and fetch again")
    return manifest


def _begun(out: Path, settings: Json) -> Json:
    for left in out.glob(".*.tmp"):
        left.unlink()
    state = _read(out / _STATE)
    if state is None:
        state = {"settings": settings, "splits": {}}
        write_json(out / _STATE, state)
    _check_same(out, state["settings"], settings)
    return state


def _check_same(out: Path, before: Json | None, settings: Json) -> None:
    if before != settings:
        raise UserError(
            f"{out} was fetched from something else ({_in_words(before)}) than now ({_in_words(settings)}); name "
            "another folder, or remove it"
        )


def _in_words(settings: Json | None) -> str:
    return json.dumps(settings, ensure_ascii=False)[:300]


def _read(path: Path) -> Json | None:
    if not path.exists():
        return None
    try:
        found = json_object(path.read_bytes())
        if odd := [name for name in ("settings", "splits") if not isinstance(found.get(name), dict)]:
            raise ValueError(f"it has no {odd[0]}")
        records_from_json(found.get("files", {}))
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200}); remove the folder and fetch again") from error
    return found


class _Split:
    """Writes the questions of one split, and its passages beside them."""

    def __init__(
        self, data_set: DataSet, origin: Origin, split: Split, out: Path, on_progress: OnProgress
    ) -> None:
        self._origin, self._split, self._out, self._on_progress = origin, split, out, on_progress
        self._names = origin.names()
        self._skipped: Counter[str] = Counter()

    def write(self) -> Json:
        """Both files, whole; counts of the questions and of the records that are none."""
        questions = passages = 0
        with (
            writing(self._out / _part(self._split)) as corpus,
            writing(self._out / f"{self._split}.jsonl") as file,
        ):
            for converted in self._converted():
                _write_line(file, converted.row)
                questions += 1
                for passage in converted.passages:
                    _write_line(corpus, _passage_row(passage))
                    passages += 1
        return {"questions": questions, "paragraphs": passages, "skipped": dict(self._skipped)}

    def _converted(self) -> Iterator[Converted]:
        seen: set[str] = set()
        for done, (place, record) in enumerate(self._origin.records(self._split), start=1):
            try:
                converted = convert(record, place, self._split, self._names)
            except Unusable as reason:
                self._skipped[str(reason)] += 1
                continue
            if converted.row["id"] in seen:
                self._skipped["the same id as one before"] += 1
                continue
            seen.add(converted.row["id"])
            yield converted
            if done % STEP == 0:
                self._on_progress(self._split, done)


def _finish(out: Path, data_set: DataSet, state: Json) -> Json:
    """Unite the passages of the splits, look at what came out, and write the manifest."""
    splits = {split: counts for split, counts in state["splits"].items() if counts["questions"]}
    if not splits:
        raise UserError(
            f"nothing of {data_set.name} can be scored: {json.dumps(state['splits'])}; it was read from "
            f"{_in_words(state['settings']['from'])}"
        )
    for split in state["splits"].keys() - splits.keys():
        (out / f"{split}.jsonl").unlink(missing_ok=True)
    number = _unite(out, list(state["splits"]))
    files = [f"{split}.jsonl" for split in splits] + ([CORPUS] if number else [])
    sets = {split: read_questions([out / f"{split}.jsonl"]) for split in splits}
    found = check_questions(sets)
    if number:
        found |= check_corpus(sets, lambda: stream_corpus([out / CORPUS]))
    manifest = {
        "name": data_set.name,
        "licence": data_set.licence,
        "url": data_set.url,
        "note": data_set.note if not number else "",
        "settings": state["settings"],
        "splits": state["splits"],
        "passages": number,
        "check": found,
        "files": records_as_json({name: record_file(out / name) for name in files}),
    }
    write_json(out / MANIFEST, manifest)
    for name in (_STATE, *(_part(split) for split in state["splits"])):
        (out / name).unlink(missing_ok=True)
    return _read(out / MANIFEST) or {}


def _unite(out: Path, splits: list[Split]) -> int:
    """Write each passage once; gives their number. Without any there is no corpus."""
    seen: set[str] = set()
    with writing(out / CORPUS) as file:
        for split in splits:
            part = out / _part(split)
            for passage in stream_corpus([part]) if part.stat().st_size else ():
                if passage.id not in seen:
                    seen.add(passage.id)
                    _write_line(file, _passage_row(passage))
    if not seen:
        (out / CORPUS).unlink()
    return len(seen)


def _part(split: str) -> str:
    return f".corpus-{split}.jsonl"


def _passage_row(passage: Passage) -> Json:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def _write_line(file: BinaryIO, row: Any) -> None:
    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
