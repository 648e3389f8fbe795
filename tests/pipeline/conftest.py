"""A user's folder and the command line in it, with a hashing encoder and without Ray."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from tests.pipeline.commands_support import contents, passage, question
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user: data, a model and a configuration that go together."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [passage(i) for i in range(4)])
    for split in ("train", "dev", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [question(f"{split}{i}") for i in range(3)])
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")  # a header that names no tensors
    sections = {
        "model": {"path": "model"},
        "data": {"corpus": "corpus.jsonl", "train": "train.jsonl", "dev": "dev.jsonl"},
        "cold_start": {"questions": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


@pytest.fixture
def environment() -> Iterator[None]:
    """What a command sets in its environment, for engines to come, ends with the test as it would with a process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def run_command(folder: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command; Ray and real encoders are out of reach."""

    def expensive(*_: object, **__: object) -> None:
        raise AssertionError("something expensive was started")

    monkeypatch.setattr("actors.session.ray.init", expensive)
    monkeypatch.setattr(
        "retriever_service.building.build.build_index", partial(build_index, load_encoder=load_hash_encoder)
    )
    monkeypatch.setattr(
        "pipeline.core.retrieval.build_index", partial(build_index, load_encoder=load_hash_encoder)
    )
    monkeypatch.setattr(
        "retriever_service.encoding.encoder.Encoder.load", lambda spec, device="cpu": HashEncoder(spec)
    )
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def refused(run_command: Any, folder: Path) -> Any:
    """Runs a command that must be refused with exit code 2 and leave everything as it was; gives the message."""

    def run(*arguments: object) -> str:
        before = contents(folder)
        result: Result = run_command(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert contents(folder) == before
        return result.stderr

    return run


@pytest.fixture
def index(folder: Path) -> Path:
    spec = EncoderSpec("minilm", query_prefix="")
    build_index([folder / "corpus.jsonl"], folder / "index", spec, load_encoder=load_hash_encoder)
    return folder / "index"
