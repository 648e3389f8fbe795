"""What a learner's model computes gradients of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from actors.learner_setup import load_model
from pipeline.core.config import LearnerConfig, LoraConfig

IDS = torch.tensor([[0, 3, 3, 7, 3, 1, 0, 9]])
LORA = {"lora": LoraConfig(rank=1)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    """Whether the output layer's weight is the embedding's."""
    return bool(request.param)


@pytest.fixture(scope="module")
def model_path(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A padding token is among those that are read: its row has a gradient of the output layer only."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def loaded(path: Path, **changes: Any) -> Any:
    config = LearnerConfig(dtype="float32", attention="eager", **changes)
    return load_model(config, path, torch.float32, {"zero_optimization": {"stage": 0}}, "lm")[0]


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(IDS, labels=IDS, use_cache=False).loss
    return loss


def operations() -> FlopCounterMode:
    """It knows torch's own products by itself."""

    def of_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: of_linear})


def test_an_embedding_has_the_gradients_of_a_plain_model(model_path: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    ours = loaded(model_path)
    for model in (plain, ours):
        for _ in range(2):  # gradients of several rows are added up
            loss_of(model).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad.layout == torch.strided
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_of_a_frozen_weight_is_computed(model_path: Path, checkpointing: bool) -> None:
    """A weight's gradient costs as much as the product that it is for, and so does the gradient of its input."""
    spent = {}
    for name, changes in {"all": {}, "adapters": LORA}.items():
        model = loaded(model_path, gradient_checkpointing=checkpointing, **changes)
        model.train()
        with operations() as forward:
            loss = loss_of(model)
        with operations() as backward:
            loss.backward()
        spent[name] = backward.get_total_flops() / forward.get_total_flops()
    again = 1.0 if checkpointing else 0.0
    assert 1.85 < spent["all"] - again < 2.05
    assert spent["adapters"] - again < 1.2
