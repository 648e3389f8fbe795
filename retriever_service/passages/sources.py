"""What a corpus is read from: files, folders of texts, saved data sets, data sets of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from retriever_service.errors import RetrieverError
from retriever_service.passages.records import Numbered, Records, open_records
from retriever_service.passages.text_folder import SUFFIXES, read_text_folder, text_files

HUB_PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")


def open_source(source: str) -> Records:
    """The records of one source (`CorpusReader` has the list of kinds).

    Raises:
        RetrieverError: there is no such source; while iterating, at the first mistake.
    """
    if source.startswith(HUB_PREFIX):
        return Records(source, "row", _read_hub(source))
    path = Path(os.path.expanduser(source))
    if path.is_dir() and not any((path / name).is_file() for name in _SAVED) and text_files(path):
        return Records(source, "passage", read_text_folder(path))
    if path.is_dir():
        return Records(source, "row", _read_saved_dataset(path))
    if not path.is_file():
        raise RetrieverError(
            f"corpus {source} does not exist; relative paths begin at data.root, or at the working directory"
        )
    return open_records(path)


def _read_saved_dataset(path: Path) -> Numbered:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise RetrieverError(
            f"{path}: neither a directory written by datasets' save_to_disk ({error}), nor one with "
            f"{' or '.join(SUFFIXES)} files"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            raise RetrieverError(f"{path} holds the splits {sorted(dataset)}; name one of their directories")
        dataset = next(iter(dataset.values()))
    yield from enumerate(dataset, start=1)


def _read_hub(source: str) -> Numbered:
    import datasets

    name, config, split, *rest = [*source.removeprefix(HUB_PREFIX).split(":"), "", ""]
    if not name or any(rest):
        raise RetrieverError(f"{source}: expected {HUB_PREFIX}NAME[:CONFIG[:SPLIT]]")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise RetrieverError(f"{source}: cannot be opened: {error}") from error
    number = 0
    try:
        for number, record in enumerate(dataset, start=1):
            yield number, record
    except (OSError, httpx.HTTPError) as error:
        raise RetrieverError(
            f"{source}: the hub broke off behind row {number}: {error}; try again"
        ) from error
