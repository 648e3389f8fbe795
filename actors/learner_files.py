"""What the learner reads from and writes to disk, besides DeepSpeed's own files. No collectives, no engine.

A checkpoint directory has two slots, `a` and `b`. `checkpoint.json` names the complete one and its files, and is
replaced as the last act of a save, so at every instant there is a complete checkpoint once the first has been
written. It may name the one before as well. An exported model appears under its final name only when it is complete,
with the sizes and checksums of its files beside them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pipeline.core.errors import UserError
from pipeline.core.models import CHECKSUMS, write_checksums
from retriever_service import files
from retriever_service.errors import RetrieverError
from retriever_service.files import json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MARKER = "checkpoint.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def local_directory(model_path: str | Path) -> Path:
    """A model directory as it is; a hub name downloaded (or found in the cache)."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model_path), ignore_patterns=["original/*", "*.gguf", "*.pth"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"model.path: {model_path} is neither a directory nor a model that the hub gives out ({error})"
        ) from error


def free_slot(directory: Path) -> str:
    """The slot that the next save overwrites. The one before the complete one may be in it, and is no more."""
    return "b" if facts_of(directory).get("slot") == "a" else "a"


def clear(slot: Path, rank: int, num_ranks: int) -> None:
    """Remove what `rank` of so many left in a slot, and rank 0 also what ranks left that there are no more."""
    for path in slot.glob("rank_*"):
        of = int(path.stem.split("_")[1])
        if of == rank or (rank == 0 and of >= num_ranks):
            path.unlink(missing_ok=True)


def commit_slot(directory: Path, slot: str, facts: Mapping[str, Any], *, keeps_before: bool = False) -> None:
    """Make `slot`, whose files are on the disk, the checkpoint.

    Args:
        facts: what to say of it without opening it: `phase`, `step`, `num_ranks`, `zero_stage`, `files`.
        keeps_before: name the one before as well, else remove it.
    """
    files.fsync(directory / slot)
    before = {name: fact for name, fact in facts_of(directory).items() if keeps_before and name != "before"}
    files.write_json(directory / MARKER, {"slot": slot, **facts, "before": before or None})
    if not before:
        shutil.rmtree(directory / ("a" if slot == "b" else "b"), ignore_errors=True)


def candidates(directory: Path) -> list[dict[str, Any]]:
    """The complete checkpoint, its slot and its facts; then the one before it, of which something may be gone.

    Raises:
        UserError: there is none, or an earlier version wrote it.
    """
    found = facts_of(directory)
    if not found:
        raise UserError(f"{directory} has no complete learner checkpoint (no {MARKER})")
    if "files" not in found:
        raise UserError(
            f"the learner checkpoint {directory} was written by an earlier version, in another form; finish the "
            "run with that version, or start a new one from the exported model beside it"
        )
    return [found] if found["before"] is None else [found, found["before"]]


def recorded(paths: Iterable[Path]) -> dict[str, files.FileRecord]:
    """Size and checksum of each file, by its name; they are on the disk afterwards."""
    records = {}
    for path in paths:
        files.fsync(path)
        records[path.name] = files.record_file(path)
    return records


def write_model(
    directory: Path, state: Mapping[str, torch.Tensor], config: PretrainedConfig, source: Path
) -> None:
    """A Hugging Face model into an empty directory: weights, configuration, the tokenizer files of `source`."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(state), directory, metadata={"format": "pt"})
    config.save_pretrained(directory)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """A model directory that `write` fills, with its checksums, at `path` whole or not at all.

    Raises:
        UserError: it could not be written.
    """
    temporary, replaced = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        write_checksums(temporary)
        # safetensors lets the owner alone read its files; a model is served by others, too.
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod((temporary / CHECKSUMS).stat().st_mode)
        for file in temporary.rglob("*"):
            files.fsync(file)
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        files.fsync(path.parent)
    except (OSError, RetrieverError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{path}: the model could not be written ({error}). Make room, or mend what else keeps files from being "
            "written, and run the same command again"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)


def facts_of(directory: Path) -> dict[str, Any]:
    """What was said of the complete checkpoint; empty without one.

    Raises:
        UserError: its marker is damaged.
    """
    marker = directory / MARKER
    try:
        found = json_object(marker.read_bytes())
        if "slot" not in found:
            raise ValueError("it names no slot")
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(
            f"{marker} is damaged ({error!s:.200}): which checkpoint is there is not known. Copy it back, or remove it "
            "to have this training done again from its start"
        ) from error
    return found
