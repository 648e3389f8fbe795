"""A model's sizes come from its config.json alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, Qwen2Config

from pipeline.core.errors import UserError
from pipeline.core.plan.shape import UnknownShape, read_shape, shape_of
from tests.pipeline.core.plan.shapes import LLAMA_8B, LLAMA_SHAPE, QWEN_7B, QWEN_SHAPE


def test_models_of_billions_are_measured_without_weights(tmp_path: Path) -> None:
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)

    assert read_shape(str(tmp_path)) == QWEN_SHAPE
    assert shape_of(LlamaConfig(**LLAMA_8B)) == LLAMA_SHAPE


def test_tied_weights_count_once() -> None:
    small = QWEN_7B | {"num_hidden_layers": 2}
    untied, tied = (
        shape_of(Qwen2Config(**small)),
        shape_of(Qwen2Config(**small | {"tie_word_embeddings": True})),
    )

    assert untied.parameters - tied.parameters == 152_064 * 3_584


def test_layers_with_a_sliding_window_are_told_from_the_others() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=512, vocab_size=256, head_dim=64)

    assert shape_of(config).windows == (512,) * 5 + (None,)


def test_a_window_that_is_switched_off_is_none() -> None:
    config = Qwen2Config(
        **QWEN_7B | {"num_hidden_layers": 2, "sliding_window": 4096, "use_sliding_window": False}
    )

    assert shape_of(config).windows == (None, None)


def test_what_has_no_attention_is_said_to_be_unknown() -> None:
    with pytest.raises(UnknownShape, match="a mamba is no language model whose sizes are known"):
        shape_of(MambaConfig(num_hidden_layers=2, vocab_size=256))


def test_a_directory_without_configuration_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .* give a directory with the model's config.json"):
        read_shape(str(tmp_path))
