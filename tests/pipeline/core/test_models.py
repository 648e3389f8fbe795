"""Model directories: what is missing is said before anything expensive starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.core.models import check_export, check_model, load_tokenizer, write_checksums
from pipeline.core.shipped import TINY_SEARCHER


def model_directory(path: Path, *files: str) -> str:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
@pytest.mark.parametrize(
    "tokenizer_file", ["tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"]
)
def test_a_complete_directory_is_accepted(tmp_path: Path, weights: str, tokenizer_file: str) -> None:
    check_model(model_directory(tmp_path / "model", "config.json", weights, tokenizer_file))


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (("model.safetensors", "tokenizer.json"), "no config.json"),
        (("config.json", "tokenizer.json"), r"no weights \(\*\.safetensors\)"),
        (("config.json", "model.safetensors"), "no tokenizer .*tokenizer.json.*copy the tokenizer files"),
        (("config.json", "model.safetensors", "tokenizer_config.json"), "no tokenizer"),
        ((), "no config.json"),
    ],
)
def test_an_incomplete_directory_is_refused_with_what_is_missing(
    tmp_path: Path, files: tuple[str, ...], missing: str
) -> None:
    path = model_directory(tmp_path / "model", *files)
    with pytest.raises(UserError, match=missing) as caught:
        check_model(path)
    assert str(caught.value).startswith(f"model.path: {path} ")


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="not a Hugging Face model directory"):
        check_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "path", ["/no/such/model", "./model", "../model", "~/model", "runs/a/model", "model"]
)
def test_a_path_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        UserError, match=f"model.path: {path} does not exist; give a model directory or a hub name"
    ):
        check_model(path)


def test_a_misspelt_directory_is_not_taken_for_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny-searcher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"models/tiny-searchr does not exist; there is models/tiny-searcher$"
    ):
        check_model("models/tiny-searchr")
    check_model("models/something-else")


def test_a_hub_name_is_left_to_transformers() -> None:
    check_model("Qwen/Qwen2.5-7B-Instruct")


def test_the_tokenizer_of_a_model_directory_is_loaded(tmp_path: Path, tokenizer: Any) -> None:
    path = model_directory(tmp_path / "model", "config.json", "model.safetensors")
    tokenizer.save_pretrained(path)
    loaded = load_tokenizer(path)
    text = "<think> Which company makes the Silver Harp? </think>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", "config.json", "model.safetensors")
    (Path(path) / "tokenizer.json").write_text("{ cut off")
    with pytest.raises(UserError, match=f"the tokenizer of {path} cannot be loaded"):
        load_tokenizer(path)


def test_an_incomplete_directory_is_refused_before_its_tokenizer_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(model_directory(tmp_path / "model", "config.json", "model.safetensors"))


def test_a_damaged_index_of_weights_is_refused(tmp_path: Path) -> None:
    weights = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    path = model_directory(tmp_path / "model", "config.json", "tokenizer.json", *weights)
    (Path(path) / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(
        UserError, match=r"model\.safetensors\.index\.json is damaged .* copy or download it again"
    ):
        check_model(path)


def test_a_damaged_export_is_refused_with_the_mend_that_there_is(tmp_path: Path) -> None:
    model = Path(model_directory(tmp_path / "model", "model.safetensors"))
    write_checksums(model)
    check_export(model)
    (model / "model.safetensors").write_text("[]")
    with pytest.raises(
        UserError,
        match=r"copy the directory back .*; the learner's checkpoint .* was removed \(storage\.keep",
    ):
        check_export(model)
    state = tmp_path / "learner"
    state.mkdir()
    (state / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"Without a copy, remove train\.json beside it"):
        check_export(model)


def test_where_the_shipped_model_is_stands_in_the_message_and_it_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"models/tiny-searcher does not exist here; .* {TINY_SEARCHER}: give"
    ):
        check_model("models/tiny-searcher")
    check_model(str(TINY_SEARCHER))
