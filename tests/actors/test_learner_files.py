"""Checkpoint slots and model directories: complete or absent, at every instant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

from actors.learner_files import (
    candidates,
    clear,
    commit_slot,
    facts_of,
    free_slot,
    local_directory,
    replace_directory,
    write_model,
)
from pipeline.core.errors import UserError
from pipeline.core.models import check_export
from retriever_service.files import write_json

FACTS = {"phase": "first", "step": 3, "num_ranks": 2, "zero_stage": 1, "files": {}}


def save(directory: Path, content: str) -> None:
    slot = free_slot(directory)
    (directory / slot).mkdir(parents=True, exist_ok=True)
    (directory / slot / "state").write_text(content)
    commit_slot(directory, slot, FACTS)


def load(directory: Path) -> str:
    return (directory / candidates(directory)[0]["slot"] / "state").read_text()


def test_the_last_complete_save_counts_and_only_that_is_kept(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        save(tmp_path, content)
        assert load(tmp_path) == content
    assert len(list(tmp_path.iterdir())) == 2  # one slot and the marker


def test_a_save_that_died_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    save(tmp_path, "complete")
    slot = free_slot(tmp_path)
    (tmp_path / slot).mkdir()
    (tmp_path / slot / "state").write_text("half")
    assert load(tmp_path) == "complete"
    save(tmp_path, "next")
    assert load(tmp_path) == "next"


def test_a_save_clears_its_slot_of_what_ranks_left_that_there_are_no_more(tmp_path: Path) -> None:
    names = ["rank_0.pt", "rank_0_000.safetensors", "rank_1_001.safetensors", "rank_12.pt"]
    for name in names:
        (tmp_path / name).write_text("x")
    clear(tmp_path, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[1], names[3]]
    clear(tmp_path, 0, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_one_before_stays_named_until_it_is_asked_for_no_more(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit_slot(tmp_path, made(tmp_path), {**FACTS, "step": step}, keeps_before=True)
        assert [found["step"] for found in candidates(tmp_path)] == [step, step - 1][:step]
    commit_slot(tmp_path, made(tmp_path), FACTS)
    assert len(candidates(tmp_path)) == 1 and len(list(tmp_path.iterdir())) == 2


def made(directory: Path) -> str:
    slot = free_slot(directory)
    (directory / slot).mkdir(exist_ok=True)
    return slot


def test_a_first_save_that_died_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / free_slot(tmp_path)).mkdir()
    with pytest.raises(UserError, match="no complete learner checkpoint"):
        candidates(tmp_path)
    assert facts_of(tmp_path) == {}


def test_what_a_checkpoint_is_of_can_be_known_without_opening_it(tmp_path: Path) -> None:
    save(tmp_path, "state")
    assert facts_of(tmp_path) == {"slot": "a", **FACTS, "before": None}


def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "checkpoint.json", {"slot": "a", "layout": {"learner.num_ranks": 2}})
    with pytest.raises(
        UserError, match=r"written by an earlier version.*start a new one from the exported model"
    ):
        candidates(tmp_path)


def test_a_model_directory_has_the_tokenizer_of_its_source_and_replaces_an_older_one(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.json", "chat_template.jinja", "model.safetensors", "notes.md"):
        (source / name).write_text(f"{name} of the source")
    config = transformers.LlamaConfig(vocab_size=4, hidden_size=8, num_attention_heads=2)
    for value in (1.0, 2.0):
        state = {"weight": torch.full((2, 3), value)}
        replace_directory(path, lambda at, state=state: write_model(at, state, config, source))  # type: ignore[misc]
    from safetensors.torch import load_file

    assert load_file(path / "model.safetensors")["weight"].tolist() == [[2.0] * 3] * 2
    assert sorted(p.name for p in path.iterdir()) == [
        "chat_template.jinja",
        "checksums.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]
    # Who may read one of them may read all.
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1


@pytest.mark.parametrize("error", [SafetensorError("I/O error"), OSError(28, "No space left on device")])
def test_a_model_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, error: Exception) -> None:
    def fail(at: Path) -> None:
        (at / "half").write_text("half")
        raise error

    path = tmp_path / "model"
    replace_directory(path, lambda at: (at / "whole").write_text("whole"))
    (tmp_path / "file").write_text("in which no folder can be made")
    with pytest.raises(UserError, match="could not be written"):
        replace_directory(tmp_path / "file/model", fail)
    (tmp_path / "file").unlink()
    with pytest.raises(
        UserError, match=f"could not be written .*{error.args[-1]}.*run the same command again"
    ):
        replace_directory(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    check_export(path)


def test_a_model_directory_is_used_where_it_is(tmp_path: Path) -> None:
    assert local_directory(tmp_path) == tmp_path
