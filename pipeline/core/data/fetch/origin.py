"""Where a data set is fetched from: the hub, or files of this machine in whatever layout they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.data.fetch.catalogue import DataSet
from pipeline.core.data.fields import ids_of, text_of
from pipeline.core.data.split_names import SPLITS, Split
from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError
from retriever_service.passages.records import Record, open_records
from retriever_service.passages.sources import HUB_PREFIX, open_source


@dataclass(frozen=True, slots=True)
class Origin:
    """What there is to fetch."""

    description: Mapping[str, Any]
    """For the manifest; another one is another fetch."""
    sources: Mapping[Split, tuple[str, ...]]
    """As `open_source` takes them."""
    aliases: Path | None = None

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """(place for messages, record) of a split, in order.

        Raises:
            UserError: while iterating, at the first mistake.
        """
        for source in self.sources[split]:
            try:
                records = open_source(source)
                for number, record in records:
                    yield records.place(number), record
            except RetrieverError as error:
                mend = (
                    "; a copy on this machine will do as well: --from FOLDER"
                    if "hub" in self.description
                    else ""
                )
                raise UserError(f"{error}{mend}") from error

    def names(self) -> dict[str, list[str]]:
        """Other names of entities by their Wikidata id (2WikiMultihopQA).

        Raises:
            UserError, RetrieverError: the file of aliases is damaged.
        """
        if self.aliases is None:
            return {}
        records, found = open_records(self.aliases), dict[str, list[str]]()
        for number, row in records:
            names = [
                *ids_of(row, "aliases", records.place(number)),
                *ids_of(row, "demonyms", records.place(number)),
            ]
            found[text_of(row, ("Q_id",), records.place(number))] = names
        return found


def find_origin(data_set: DataSet, given: str | None) -> Origin:
    """The hub's repository, another one (`hf:NAME[:CONFIG]`), or what a folder holds.

    Raises:
        UserError: there is no such folder or repository, or nothing of this data set in it.
    """
    if given is None:
        return _on_hub(data_set.hub, data_set.hub_splits)
    if given.startswith(HUB_PREFIX):
        repository = given.removeprefix(HUB_PREFIX)
        return _on_hub(repository, _splits_of(repository))
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--from is {given}, which is no folder; name one that holds a copy of {data_set.name}"
        )
    found = {split: files for split in SPLITS if (files := _files_of(data_set, split, folder))}
    if not found:
        raise UserError(
            f"{folder} holds no copy of {data_set.name} in a layout that is known: it has neither the authors' files "
            f"({', '.join(data_set.own_files.values())}), nor the hub's Parquet files, nor train.jsonl and the like; "
            f"there are {', '.join(sorted(p.name for p in folder.iterdir())[:10]) or 'no files'}"
        )
    paths = {split: [str(path.relative_to(folder)) for path in files] for split, files in found.items()}
    sizes = {
        str(p.relative_to(folder)): p.stat().st_size for files in found.values() for p in files if p.is_file()
    }
    aliases = next(folder.glob(f"**/{data_set.other_files.get('aliases', 'no such file')}"), None)
    return Origin(
        {"folder": str(folder.resolve()), "files": paths, "bytes": sizes, "aliases": aliases is not None},
        {split: tuple(map(str, files)) for split, files in found.items()},
        aliases,
    )


def _on_hub(repository: str, splits: Mapping[Split, str]) -> Origin:
    name, _, config = repository.partition(":")
    sources = {split: (f"{HUB_PREFIX}{name}:{config}:{called}",) for split, called in splits.items()}
    return Origin({"hub": repository}, sources)


def _splits_of(repository: str) -> dict[Split, str]:
    """Our splits that a repository of the hub has, by its names for them."""
    import datasets

    name, _, config = repository.partition(":")
    try:
        there = datasets.get_dataset_split_names(name, config or None)
    except (OSError, ValueError) as error:
        raise UserError(f"--from {HUB_PREFIX}{repository}: cannot be opened: {error}") from error
    names: Mapping[Split, tuple[str, ...]] = {
        "train": ("train",),
        "dev": ("dev", "validation"),
        "test": ("test",),
    }
    return {split: called for split in SPLITS for called in names[split] if called in there}


def _files_of(data_set: DataSet, split: Split, folder: Path) -> list[Path]:
    """The files of a split (shards of a table may be several), or the directory of a saved one."""
    for root in (folder / data_set.name, folder):
        for pattern in data_set.patterns(split):
            files = sorted(path for path in root.glob(pattern) if path.is_file())
            if len({path.parent for path in files if path.name != "dataset_info.json"}) > 1:
                few = ", ".join(str(path.relative_to(folder)) for path in files[:3])
                raise UserError(
                    f"{folder} holds several copies of {data_set.name}'s {split} ({few}, ...); name the folder of one "
                    "with --from"
                )
            if files:
                return [path.parent if path.name == "dataset_info.json" else path for path in files]
    return []


def settings_of(data_set: DataSet, origin: Origin) -> dict[str, Any]:
    """By which a fetch is known again."""
    settings: dict[str, Any] = json.loads(json.dumps({"name": data_set.name, "from": origin.description}))
    return settings
