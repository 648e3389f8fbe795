"""Checks of model directories, before anything expensive is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


def check_model(path: str) -> None:
    """Refuse a directory that is no complete model.

    A `path` that is not on disk is taken for a hub name and left to transformers.

    Raises:
        UserError: configuration, weights or tokenizer are missing.
    """
    directory = Path(path)
    if not directory.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model.path: {path} does not exist; give a model directory or a hub name")
        return
    if not (directory / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json; it is not a Hugging Face model directory")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise UserError(f"model.path: {path} has no weights (*.safetensors); save the model there again")
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    if not any((directory / name).is_file() for name in tokenizer_files):
        raise UserError(
            f"model.path: {path} has no tokenizer (none of {', '.join(tokenizer_files)}); copy the tokenizer files of "
            "the model it was made from into it"
        )


def load_tokenizer(path: str) -> Any:
    """The Hugging Face tokenizer of a model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    check_model(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path: the tokenizer of {path} cannot be loaded: {error}") from error
