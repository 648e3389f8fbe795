"""`configs/paper`: every data set with every backbone is a configuration that fits the GPUs which it names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from pipeline.core.config import Config
from pipeline.core.data.fetch.catalogue import DATA_SETS
from pipeline.core.plan.shape import read_shape
from pipeline.methods import load
from tests.pipeline.core.plan.shapes import LLAMA_8B, QWEN_7B
from tests.test_docs import check_command

PAPER = Path(__file__).resolve().parents[3] / "configs" / "paper"
METHOD, COLD_START = PAPER / "method.yaml", PAPER / "cold-start.yaml"
FILES = sorted(PAPER.rglob("*.yaml"))
DATA, MODELS = (sorted((PAPER / folder).glob("*.yaml")) for folder in ("data", "models"))
QWEN_3B = QWEN_7B | {
    "vocab_size": 151_936,
    "hidden_size": 2_048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LLAMA_3B = LLAMA_8B | {
    "hidden_size": 3_072,
    "intermediate_size": 8_192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}
MISTRAL_7B = LLAMA_8B | {"vocab_size": 32_768, "sliding_window": None}
MISTRAL_24B = MISTRAL_7B | {
    "vocab_size": 131_072,
    "hidden_size": 5_120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 40,
    "head_dim": 128,
}
SHAPES: Mapping[str, tuple[type[PretrainedConfig], dict[str, Any], float]] = {
    "qwen2.5-3b": (Qwen2Config, QWEN_3B, 3.09e9),
    "qwen2.5-7b": (Qwen2Config, QWEN_7B, 7.62e9),
    "llama3.2-3b": (LlamaConfig, LLAMA_3B, 3.21e9),
    "llama3.1-8b": (LlamaConfig, LLAMA_8B, 8.03e9),
    "mistral-7b": (MistralConfig, MISTRAL_7B, 7.25e9),
    "mistral-24b": (MistralConfig, MISTRAL_24B, 23.57e9),
}
"""Of each model its config.json, as far as it has to do with sizes, and its number of parameters."""

by_name = {"ids": lambda path: path.stem}


@pytest.mark.parametrize("model", MODELS, **by_name)
@pytest.mark.parametrize("data", DATA, **by_name)
def test_every_data_set_goes_with_every_backbone_and_has_the_papers_values(data: Path, model: Path) -> None:
    config = load([METHOD, data, model])
    learner, rollout, agent = config.learner, config.rollout, config.agent
    assert (learner.learning_rate, learner.warmup_ratio, learner.zero_stage) == (2e-6, 0.1, 3)
    assert (learner.dtype, rollout.dtype, config.model.max_length) == ("bfloat16", "bfloat16", 8192)
    assert (rollout.samples, agent.documents, agent.max_searches) == (2, 5, 5)
    assert (config.em.iterations, config.weighting.method) == (5, "likelihood")
    per_gpu = 2 if model.stem == "mistral-24b" else 4
    assert learner.batch_size == per_gpu * 16 * learner.num_ranks
    assert (config.data.train, config.data.dev) == (
        (f"{data.stem}/train.jsonl",),
        (f"{data.stem}/dev.jsonl",),
    )
    assert config.cold_start.trajectories == f"cold-start/{model.stem}.parquet"


def test_there_is_a_file_for_each_data_set_and_each_backbone_of_the_paper() -> None:
    assert (
        {path.stem for path in DATA} == {"nq", "hotpotqa", "musique", "2wikimultihopqa"} <= DATA_SETS.keys()
    )
    assert {path.stem for path in MODELS} == SHAPES.keys()


@pytest.mark.parametrize("model", MODELS, **by_name)
def test_every_backbone_fits_the_gpus_that_its_file_names(
    model: Path, run_command: Any, folder: Path
) -> None:
    kind, sizes, parameters = SHAPES[model.stem]
    kind(**sizes).save_pretrained(folder / "backbone")
    assert "eight 80 GB GPUs" in model.read_text(encoding="utf-8").splitlines()[0]
    files = [
        word for path in (METHOD, PAPER / "data" / "hotpotqa.yaml", model) for word in ("--config", path)
    ]

    result = run_command("plan", *files, "model.path=backbone", "--gpus", 8, "--json")

    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["refusals"], plan["warnings"], plan["layout"]["device"]) == ([], [], "gpu")
    assert read_shape(str(folder / "backbone")).parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("model", MODELS, **by_name)
def test_the_cold_start_is_made_of_a_thousand_questions_of_hotpotqa(model: Path) -> None:
    config = load([METHOD, model, COLD_START])
    assert (config.cold_start.questions, config.cold_start.trajectories) == (1000, None)
    assert config.data.train == load([METHOD, model]).cold_start.sources == ("hotpotqa/train.jsonl",)
    assert (config.retriever.index, config.agent.documents) == (None, 1)
    assert config.agent.model_copy(update={"documents": 5}) == load([METHOD, model]).agent


def test_selection_orders_the_passages_of_the_cold_start_and_of_the_training_alike() -> None:
    select = PAPER / "select.yaml"
    made, trained = (
        load([*files, select]).agent for files in ([METHOD, MODELS[0], COLD_START], [METHOD, MODELS[0]])
    )
    assert made == trained
    assert (trained.select, trained.documents, trained.selected_documents) == (True, 5, 5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_in_the_comments_exist_with_their_options_and_files(path: Path) -> None:
    commands = commands_in(path)
    for words in commands:
        check_command(words, where=path.name)
        files = [word for option, word in pairwise(words) if option == "--config"]
        assert all((PAPER.parents[1] / file).is_file() for file in files)
    if path in DATA:
        assert commands == [["data", "fetch", path.stem, "--out", f"/data/{path.stem}"]]


def test_the_command_that_builds_the_index_builds_that_of_the_configuration() -> None:
    (words,) = (words for words in commands_in(METHOD) if words[0] == "index")
    given, config = dict(zip(words[2::2], words[3::2], strict=True)), method()
    assert (given["--out"], given["--encoder"]) == (config.retriever.index, config.retriever.encoder)
    assert (given["--corpus"],) == config.data.corpus


def method() -> Config:
    return load([METHOD, *DATA[:1], *MODELS[:1]])


def commands_in(path: Path) -> list[list[str]]:
    text = re.sub(r"\\\n *#", "", path.read_text(encoding="utf-8"))
    return [shlex.split(command) for command in re.findall(r"# +exsearch (.*)", text)]
