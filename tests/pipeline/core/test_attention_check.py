"""Models that packed rows would compute otherwise are known from their configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.core.attention_check import check_attention
from pipeline.core.errors import UserError
from tests.pipeline.core.test_attention import CONFIGS, MIXED, MORE_THAN_A_WINDOW, SIZES

PHI3: dict[str, Any] = {**SIZES, "num_attention_heads": 4, "pad_token_id": 0}
STATEFUL = {
    "qwen3-next": transformers.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"]),
    "lfm2": transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "mamba": transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2),
    "falcon-h1": transformers.FalconH1Config(**SIZES),
}


def check(config: Any, path: Path, attention: Any = "packed") -> None:
    config.save_pretrained(path)
    check_attention(str(path), attention)


@pytest.mark.parametrize("attention", ["packed", "eager", "flash_attention_2"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_usual_models_are_accepted(name: str, attention: str, tmp_path: Path, caplog: Any) -> None:
    check(CONFIGS[name], tmp_path, attention)
    assert caplog.text == ""


def test_so_are_mixtures_of_experts(tmp_path: Path, caplog: Any) -> None:
    check(transformers.MixtralConfig(**SIZES, num_local_experts=2), tmp_path)
    assert caplog.text == ""


def test_soft_capping_is_for_eager_attention(tmp_path: Path) -> None:
    config = MORE_THAN_A_WINDOW["gemma2"]
    with pytest.raises(
        UserError, match=r"packed .* Gemma2Attention asks for softcap; set learner.attention=eager"
    ):
        check(config, tmp_path)
    check(config, tmp_path, "eager")


def test_a_gemma_2_without_soft_capping_is_accepted(tmp_path: Path) -> None:
    check(transformers.Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=None), tmp_path)


def test_where_no_attention_keeps_the_examples_apart_another_model_is_asked_for(tmp_path: Path) -> None:
    """transformers makes the masks of GPT-OSS without regard to positions."""
    config = MORE_THAN_A_WINDOW["gpt-oss"]
    with pytest.raises(UserError, match=r"packed .* GptOssAttention asks for s_aux; take another model"):
        check(config, tmp_path)
    with pytest.raises(UserError, match=r"eager .* do not keep the examples .* apart; take another model"):
        check(config, tmp_path, "eager")


def test_chunked_attention_is_not_a_window(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        layer_types=["chunked_attention"] * 2,
    )
    with pytest.raises(
        UserError, match="tokens of Llama4TextAttention see others than those of a causal window"
    ):
        check(config, tmp_path)


def test_a_window_that_only_the_mask_knows_of_is_noticed(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=MIXED,
        num_experts=2,
        num_experts_per_tok=1,
    )
    with pytest.raises(
        UserError, match=r"tokens of Qwen2MoeAttention see others .*; set learner.attention=eager"
    ):
        check(config, tmp_path)


def test_attention_in_both_directions_is_noticed(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="tokens of Gemma3Attention see others than those of a causal window"):
        check(config, tmp_path)


@pytest.mark.parametrize("attention", ["packed", "eager"])
@pytest.mark.parametrize("name", list(STATEFUL))
def test_layers_that_keep_a_state_are_refused_whatever_the_attention(
    name: str, attention: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="from one example of a packed row into the next; take a model that has"
    ):
        check(STATEFUL[name], tmp_path, attention)


def test_layers_with_an_attention_of_their_own_are_refused(tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(
        UserError, match="2 of its 2 layers do not ask transformers for their attention; take"
    ):
        check(config, tmp_path)


def test_so_are_models_that_know_certain_attentions_only(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)
    with pytest.raises(
        UserError, match=r"packed does not go with .*; set learner.attention=eager .* or take"
    ):
        check(config, tmp_path)
    check(config, tmp_path, "eager")


def test_what_cannot_be_found_out_is_said_and_let_through(tmp_path: Path, caplog: Any) -> None:
    """The positions of long-context Phi 3 change its frequencies."""
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 1e4}
    check(transformers.Phi3Config(**PHI3, rope_parameters=rope), tmp_path)
    assert "could not be found out" in caplog.text


def test_a_configuration_that_cannot_be_read_is_left_to_whoever_loads_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check_attention(str(tmp_path), "packed")
