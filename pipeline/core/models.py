"""Checks of model directories, before anything expensive is done with them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

from pipeline.core.config.task import SHIPPED_MODEL
from pipeline.core.errors import UserError
from pipeline.core.shipped import TINY_SEARCHER
from retriever_service import files
from retriever_service.errors import RetrieverError
from retriever_service.imports import quick_imports


def check_model(path: str) -> None:
    """Refuse a directory that is no complete model.

    A `path` that is not on disk is taken for a hub name and left to transformers, unless it looks like a misspelt one.

    Raises:
        UserError: configuration, weights or tokenizer are missing.
    """
    directory = Path(path)
    if not directory.exists():
        beside = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
        if near := get_close_matches(directory.name, beside, n=1, cutoff=0.8):
            raise UserError(f"model.path: {path} does not exist; there is {directory.with_name(near[0])}")
        if path == SHIPPED_MODEL:
            raise UserError(
                f"model.path: {path} does not exist here; the program's own is {TINY_SEARCHER}: give that path, or "
                "another model"
            )
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model.path: {path} does not exist; give a model directory or a hub name")
        return
    if not (directory / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json; it is not a Hugging Face model directory")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise UserError(f"model.path: {path} has no weights (*.safetensors); save the model there again")
    if missing := [file.name for file in _shards(directory) if not file.is_file()]:
        raise UserError(
            f"model.path: {path} lacks {len(missing)} of its files of weights ({', '.join(missing[:3])}); copy or "
            "download them again"
        )
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    if not any((directory / name).is_file() for name in tokenizer_files):
        raise UserError(
            f"model.path: {path} has no tokenizer (none of {', '.join(tokenizer_files)}); copy the tokenizer files of "
            "the model it was made from into it"
        )


def _shards(directory: Path) -> list[Path]:
    """Files that the index of weights in several files names; empty without one."""
    indexes = (directory / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin"))
    if (index := next((path for path in indexes if path.is_file()), None)) is None:
        return []
    try:
        names = set(files.json_object(index.read_bytes())["weight_map"].values())
        if odd := [name for name in names if not isinstance(name, str) or name != Path(name[:255]).name]:
            raise ValueError(f"not a name of a file: {odd[0]!r:.100}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.path: {index} is damaged ({error!r:.200}); copy or download it again"
        ) from error
    return [directory / name for name in sorted(names)]


def local_snapshot(path: str) -> Path | None:
    """Where a model lies on this machine: the directory, or the snapshot of a hub name; None if that is still to be
    downloaded (then how large it is cannot be known).

    Raises:
        UserError: it is not whole and the hub is out of reach (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants

    if Path(path).is_dir():
        return Path(path)
    fetch = f"fetch it where there is a network (hf download {path}), with the same HF_HOME"
    # The listing of a snapshot is not in the cache: what there is of it counts as all of it.
    if (snapshot := cached_files(path)) is None:
        if constants.is_offline_mode():
            raise UserError(
                f"model.path: {path} is no directory here, nor in the cache ({constants.HF_HUB_CACHE}) of the hub, "
                f"which is out of reach (HF_HUB_OFFLINE); {fetch}"
            )
        return None
    try:
        check_model(str(snapshot))
    except UserError as error:
        if constants.is_offline_mode():
            raise UserError(f"{error}. The hub is out of reach (HF_HUB_OFFLINE): {fetch}") from error
        return None
    return snapshot


def cached_files(path: str) -> Path | None:
    """The directory, or what is in the cache of a hub name, whole or not. The hub is never asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@dataclass(frozen=True, slots=True)
class ModelSize:
    bytes: int
    """Of its files of weights."""
    parameters: int


def model_size(directory: Path) -> ModelSize:
    """Counted from the headers of its safetensors files; other files are taken for two bytes a parameter.

    Raises:
        UserError: a file is damaged.
    """
    weights = list(directory.glob("*.safetensors")) or list(directory.glob("pytorch_model*.bin"))
    total = sum(file.stat().st_size for file in weights)
    counted = sum(n for file in weights if file.suffix == ".safetensors" for n in _tensor_sizes(file))
    return ModelSize(total, counted or total // 2)


def _tensor_sizes(file: Path) -> list[int]:
    """Elements of each tensor. The file begins with the length of a JSON header, 8 bytes little-endian."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = files.json_object(stream.read(min(length, file.stat().st_size)))
        return [prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.path: {file} is cut off or no safetensors file; copy or download it again"
        ) from error


CHECKSUMS = "checksums.json"
"""In a model directory that a run exported: size and SHA-256 of its other files."""


def write_checksums(directory: Path) -> None:
    """Note what the files of an exported model are known by."""
    files.write_json(directory / CHECKSUMS, files.records_as_json(files.record_directory(directory)))


def check_export(directory: Path) -> None:
    """Refuse a model that a run exported and that is not what was written; reads all of it.

    Raises:
        UserError: a file is missing, cut short or changed.
    """
    try:
        written = files.json_object((directory / CHECKSUMS).read_bytes())
        records = files.records_from_json(written)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory} is no whole model: {CHECKSUMS} cannot be read ({error}); {_mend(directory)}"
        ) from error
    try:
        for name, record in records.items():
            files.check_contents(directory / name, record, _mend(directory))
    except RetrieverError as error:
        raise UserError(str(error)) from error


def _mend(directory: Path) -> str:
    copy = "copy the directory back from where it is whole"
    if not (directory.parent / "learner" / "checkpoint.json").exists():
        return f"{copy}; the learner's checkpoint that it was exported from was removed (storage.keep_states)"
    return (
        f"{copy}. Without a copy, remove train.json beside it and run the same command: the model is exported again "
        "from the learner's checkpoint there"
    )


def load_tokenizer(path: str) -> Any:
    """The Hugging Face tokenizer of a model that is there as a whole.

    Raises:
        UserError: what `check_model` and `read_tokenizer` raise.
    """
    check_model(path)
    return read_tokenizer(path)


def read_tokenizer(path: str) -> Any:
    """The Hugging Face tokenizer of a model directory or hub name, whatever else is there.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with quick_imports():  # also around the first use, which imports more
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(path)
        except Exception as error:  # the library of tokenizers raises nothing narrower
            where = (
                "" if Path(path).is_dir() else ", which is no directory here and was taken for a hub name,"
            )
            raise UserError(
                f"model.path: the tokenizer of {path}{where} cannot be loaded: {error!s:.300}"
            ) from error
