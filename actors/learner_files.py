"""What the learner reads from and writes to disk, besides DeepSpeed's own files. No collectives, no engine.

A checkpoint directory has two slots, `a` and `b`. `checkpoint.json` names the complete one and is replaced
as the last act of a save, so at every instant there is a complete checkpoint once the first has been
written. An exported model appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.core.errors import UserError
from retriever_service import files

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
    """The slot that a save may overwrite, emptied."""
    slot = "b" if facts_of(directory).get("slot") == "a" else "a"
    shutil.rmtree(directory / slot, ignore_errors=True)
    return slot


def commit_slot(directory: Path, slot: str, facts: Mapping[str, Any]) -> None:
    """Make `slot` the checkpoint and remove the one before it.

    Args:
        facts: what to say of it without opening it: `phase`, `step`, `num_ranks`, `zero_stage`.
    """
    for file in (directory / slot).rglob("*"):
        files.fsync(file)
    files.write_json(directory / MARKER, {"slot": slot, **facts})
    shutil.rmtree(directory / ("a" if slot == "b" else "b"), ignore_errors=True)


def committed(directory: Path) -> dict[str, Any]:
    """The complete checkpoint: its slot and its facts.

    Raises:
        UserError: there is none, or an earlier version wrote it.
    """
    found = facts_of(directory)
    if not found:
        raise UserError(f"{directory} has no complete learner checkpoint (no {MARKER})")
    if "layout" in found:
        raise UserError(
            f"the learner checkpoint {directory} was written by an earlier version, in another form; finish the "
            "run with that version, or start a new one from the exported model beside it"
        )
    return found


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
    """A directory that `write` fills, at `path` whole or not at all."""
    temporary, replaced = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for file in temporary.rglob("*"):
        files.fsync(file)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    files.fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def facts_of(directory: Path) -> dict[str, Any]:
    """What was said of the complete checkpoint; empty without one."""
    try:
        committed: dict[str, Any] = json.loads((directory / MARKER).read_text())
    except FileNotFoundError:
        return {}
    return committed
