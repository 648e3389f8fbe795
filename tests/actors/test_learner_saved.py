"""What a learner on real DeepSpeed ranks writes: checkpoints to go on from, and models that others open."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actors.learner import Learner
from pipeline.core.config import LoraConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from tests.actors.ranks import (
    AFTER_EACH_STEP,
    CONFIG,
    LONGEST,
    Result,
    Weights,
    assert_same_weights,
    build_model,
    make_examples,
    nll_of,
    run_ranks,
    train,
    weights_of,
)

pytestmark = pytest.mark.component

SAVING = CONFIG.model_copy(update={"checkpoint_minutes": AFTER_EACH_STEP})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


# ------------------------------------------------------------------ checkpoints


def train_until_killed(learner: Learner, examples: list[Example], path: Path) -> None:
    """Two M-steps; begins a checkpoint after each step of the second, and dies in its step 5."""
    learner.train(examples, nll_of(learner), phase_seed=0)

    def die(_: dict[str, float]) -> None:
        if learner.progress()["step"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path, on_step=die)


def go_on(learner: Learner, examples: list[Example], path: Path) -> Result:
    report = learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path)
    return report, weights_of(learner)


def two_phases(learner: Learner, examples: list[Example]) -> Result:
    learner.train(examples, nll_of(learner), phase_seed=0)
    return train(learner, examples)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="stage 0"),
        pytest.param({"num_ranks": 2, "zero_stage": 1}, id="stage 1", marks=pytest.mark.chaos),
        pytest.param({"num_ranks": 2, "zero_stage": 3}, id="stage 3"),
        pytest.param(
            {"num_ranks": 2, "zero_stage": 2, "lora": LoraConfig(rank=2, dropout=0.3)},
            id="stage 2, dropout",
            marks=pytest.mark.chaos,
        ),
    ],
)
def test_a_killed_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, examples = SAVING.model_copy(update=changes), make_examples()
    assert run_ranks(config, model_path, train_until_killed, examples, tmp_path) is None
    resumed, weights = run_ranks(config, model_path, go_on, examples, tmp_path)
    undisturbed = run_ranks(config, model_path, two_phases, examples)
    assert resumed.history == undisturbed[0].history
    assert resumed.resumed_at in (3, 4)
    assert resumed.total_tokens == undisturbed[0].total_tokens
    assert_same_weights(weights, undisturbed[1], atol=0)


def train_and_save(learner: Learner, examples: list[Example], path: Path) -> Result:
    result = train(learner, examples)
    learner.save(path)
    return result


def test_a_checkpoint_from_the_end_of_a_phase_is_not_trained_on_again(
    model_path: Path, tmp_path: Path
) -> None:
    examples = make_examples()
    done = run_ranks(CONFIG, model_path, train_and_save, examples, tmp_path)
    again = run_ranks(CONFIG, model_path, go_on, examples, tmp_path)
    assert again[0].history == done[0].history
    assert again[0].resumed_at == done[0].steps
    assert_same_weights(again[1], done[1], atol=0)


def train_on_from(learner: Learner, examples: list[Example], start: Path, checkpoints: Path) -> Result:
    report = learner.train(examples, nll_of(learner), phase_seed=1, start=start, checkpoints=checkpoints)
    return report, weights_of(learner)


def first_phase(learner: Learner, examples: list[Example], start: Path) -> None:
    learner.train(examples, nll_of(learner), phase_seed=0)
    learner.save(start)


def test_a_checkpoint_of_another_phase_is_not_gone_on_from(model_path: Path, tmp_path: Path) -> None:
    """Where this phase writes its own there lies one of another: it starts from the version that it is told."""
    examples = make_examples()
    start, elsewhere = tmp_path / "version", tmp_path / "phase"
    run_ranks(CONFIG, model_path, first_phase, examples, start)
    run_ranks(CONFIG, model_path, train_and_save, make_examples(seed=1), elsewhere)
    found = run_ranks(SAVING, model_path, train_on_from, examples, start, elsewhere)
    assert found[0].resumed_at == 0
    assert_same_weights(found[1], run_ranks(CONFIG, model_path, two_phases, examples)[1], atol=0)


LAYOUTS: list[dict[str, Any]] = [
    {"num_ranks": 2, "zero_stage": 2},
    {"num_ranks": 1, "zero_stage": 0},
    {"num_ranks": 2, "zero_stage": 3},
    {"num_ranks": 1, "zero_stage": 3},
    {"num_ranks": 2, "zero_stage": 1, "offload_optimizer": True},
    {"num_ranks": 3, "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    {"num_ranks": 1, "zero_stage": 2, "gradient_checkpointing": True},
    {"num_ranks": 2, "zero_stage": 0, "tokens_per_microbatch": LONGEST},
    {"num_ranks": 2, "zero_stage": 2},
]
"""From 2 ranks to 1 and back, from ZeRO-2 to ZeRO-3 and back, over all the others, and with less memory."""


def one_step_more(learner: Learner, examples: list[Example], path: Path) -> None:
    """Dies in the second step that it does itself, when the checkpoint of the first is there."""
    steps: list[dict[str, float]] = []

    def die(step: dict[str, float]) -> None:
        steps.append(step)
        if len(steps) == 2:
            learner.finish_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path, on_step=die)


@pytest.mark.parametrize(
    ("lora", "layouts"),
    [pytest.param(None, LAYOUTS, marks=pytest.mark.chaos), (LoraConfig(rank=2), LAYOUTS[:3])],
)
def test_each_step_of_a_phase_may_run_on_another_layout(
    model_path: Path, tmp_path: Path, lora: LoraConfig | None, layouts: list[dict[str, Any]]
) -> None:
    examples = make_examples()
    config = SAVING.model_copy(update={"lora": lora, "epochs": len(layouts) // 3})
    undisturbed = run_ranks(config, model_path, train, examples)
    assert undisturbed[0].steps == len(layouts)
    for layout in layouts[:-1]:
        assert (
            run_ranks(config.model_copy(update=layout), model_path, one_step_more, examples, tmp_path) is None
        )
    resumed = run_ranks(config.model_copy(update=layouts[-1]), model_path, go_on, examples, tmp_path)
    assert resumed[0].resumed_at == len(layouts) - 1
    losses = [[step["loss"] for step in report.history] for report in (resumed[0], undisturbed[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_weights(resumed[1], undisturbed[1], atol=5e-6)


def test_what_cannot_be_gone_on_from_is_refused(model_path: Path, tmp_path: Path) -> None:
    examples = make_examples()
    run_ranks(CONFIG, model_path, train_and_save, examples, tmp_path / "full")
    adapters = CONFIG.model_copy(update={"lora": LoraConfig(rank=2)})
    with pytest.raises(UserError, match=r"has other trained parameters .* Is learner\.lora"):
        run_ranks(adapters, model_path, load, tmp_path / "full")
    with pytest.raises(UserError, match="no complete learner checkpoint"):
        run_ranks(CONFIG, model_path, load, tmp_path / "elsewhere")


def load(learner: Learner, path: Path) -> None:
    learner.load(path)


# ------------------------------------------------------------------ weights, out


def train_and_export(learner: Learner, examples: list[Example], path: Path) -> Weights:
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.export(path)
    learner.export(path)  # over an earlier one
    return weights_of(learner)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_ranks": 2, "zero_stage": 1}, {"num_ranks": 2, "zero_stage": 3}],
    ids=["stage 0", "stage 1", "stage 3"],
)
def test_an_exported_model_opens_in_transformers_with_the_trained_weights(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "model"
    weights = run_ranks(
        CONFIG.model_copy(update=changes), model_path, train_and_export, make_examples(), path
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_weights({n: p.detach().numpy() for n, p in opened.named_parameters()}, weights, atol=0)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    assert opened.config.to_diff_dict() == original.config.to_diff_dict()
    files = ["checksums.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in path.iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def lora_state(learner: Learner, examples: list[Example], path: Path) -> tuple[Weights, Weights]:
    """Frozen weights after training, and the logits of the live model (adapters beside the weights)."""
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.export(path)
    trained = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    ids = torch.arange(20)[None]
    learner.model.eval()
    kwargs = {"segment_lengths": (20,), "use_cache": False}
    with torch.no_grad():
        logits = learner.engine(input_ids=ids, position_ids=ids.new_tensor(range(20))[None], **kwargs).logits
    return weights_of(learner), {"logits": logits.numpy()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_ranks": 2, "zero_stage": 1}, {"num_ranks": 2, "zero_stage": 3}],
    ids=["stage 0", "stage 1", "stage 3"],
)
def test_lora_trains_adapters_only_and_exports_the_merged_model(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update={"lora": LoraConfig(rank=4, alpha=8.0), **changes})
    path = tmp_path / "model"
    weights, live = run_ranks(config, model_path, lora_state, make_examples(), path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_weights({n: p.detach().numpy() for n, p in opened.named_parameters()}, weights, atol=0)
    np.testing.assert_allclose(
        opened(torch.arange(20)[None]).logits.detach().numpy(), live["logits"], atol=1e-5
    )
    original = dict(transformers.AutoModelForCausalLM.from_pretrained(model_path).named_parameters())
    changed = {n for n, w in weights.items() if not np.array_equal(w, original[n].detach().numpy())}
    assert changed == {n for n in original if n.endswith("proj.weight")}
