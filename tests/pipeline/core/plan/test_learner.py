"""What a rank holds, against what torch keeps of a real forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.core.attention import PACKED
from pipeline.core.plan.learner import RankLoad, rank_memory, saved_per_token, trained_parameters
from pipeline.core.plan.memory import Dtype, Where
from pipeline.core.plan.shape import shape_of
from tests.pipeline.core.plan.shapes import QWEN_SHAPE

TOKENS = 512
LOAD = RankLoad(
    device="cpu",
    dtype="float32",
    ranks=1,
    zero_stage=1,
    row_tokens=4_096,
    trained_tokens=600,
    checkpointing=False,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(vocab_size=256, hidden_size=256, intermediate_size=1_024, num_hidden_layers=2,
                    num_attention_heads=8, num_key_value_heads=2),
        LlamaConfig(vocab_size=256, hidden_size=512, intermediate_size=1_024, num_hidden_layers=3,
                    num_attention_heads=8, num_key_value_heads=8),
        Qwen3Config(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                    num_attention_heads=8, num_key_value_heads=2, head_dim=64),
        Gemma3TextConfig(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=1, head_dim=128),
    ],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(config: PretrainedConfig, dtype: Dtype) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=PACKED)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            input_ids=torch.randint(256, (1, TOKENS)),
            position_ids=torch.arange(TOKENS)[None],
            segment_lengths=(TOKENS,),
            use_cache=False,
            logits_to_keep=1,
        )

    shape = shape_of(config)
    assert sum(kept.values()) == pytest.approx(shape.layers * TOKENS * saved_per_token(shape, dtype), rel=0.1)


def held(where: Where = "host", **changes: object) -> int:
    return rank_memory(QWEN_SHAPE, replace(LOAD, **changes)).on(where)  # type: ignore[arg-type]


def test_more_ranks_and_higher_stages_need_less_of_each_rank() -> None:
    assert held(zero_stage=1, ranks=8) > held(zero_stage=2, ranks=8) > held(zero_stage=3, ranks=8)
    assert held(zero_stage=2, ranks=2) > held(zero_stage=2, ranks=4)


def test_checkpointing_lets_one_layer_at_a_time_be_kept() -> None:
    whole, checkpointed = (
        rank_memory(QWEN_SHAPE, replace(LOAD, ranks=64, zero_stage=3, checkpointing=checkpointing))
        for checkpointing in (False, True)
    )

    assert whole.of("activations") == 28 * 4_096 * saved_per_token(QWEN_SHAPE, "float32")
    assert (checkpointed.of("activations"), checkpointed.of("checkpoints")) == (0, 28 * 4_096 * 4 * 3_584)


def test_adapters_have_a_small_optimiser() -> None:
    trained = trained_parameters(QWEN_SHAPE, 16)

    assert trained == pytest.approx(40.4e6, rel=0.01)  # what peft counts for "all-linear" of this model
    states = rank_memory(QWEN_SHAPE, replace(LOAD, lora_rank=16))
    assert states.of("Adam") == 8 * trained
    assert states.of("weights") == 4 * QWEN_SHAPE.parameters


def test_a_reference_is_whole_on_each_rank() -> None:
    load = replace(LOAD, ranks=8, zero_stage=3)
    more = rank_memory(QWEN_SHAPE, replace(load, keeps_reference=True))

    assert more.of("reference") == 4 * QWEN_SHAPE.parameters
    assert more.on("host") - rank_memory(QWEN_SHAPE, load).on("host") == more.of("reference")


def test_gradients_of_parts_are_whole_on_each_rank_with_their_sum_and_what_is_left_of_one() -> None:
    load = replace(LOAD, ranks=8, zero_stage=2)
    more = rank_memory(QWEN_SHAPE, replace(load, parts_apart=2))

    assert more.of("gradients of the parts") == 4 * 4 * QWEN_SHAPE.parameters
    assert rank_memory(QWEN_SHAPE, load).of("gradients of the parts") == 0


def test_latent_tasks_are_trained_beside_whatever_else_is() -> None:
    channels, attention = 192, 3_584
    of_latent = 28 * channels * (3_584 + attention)

    for lora in (None, 16):
        assert (
            trained_parameters(QWEN_SHAPE, lora, channels) == trained_parameters(QWEN_SHAPE, lora) + of_latent
        )
    states = rank_memory(QWEN_SHAPE, replace(LOAD, lora_rank=16, latent_channels=channels))
    assert states.of("Adam") == 8 * (trained_parameters(QWEN_SHAPE, 16) + of_latent)


def test_bfloat16_without_zero_runs_as_stage_1() -> None:
    plain = replace(LOAD, dtype="bfloat16", zero_stage=0)

    assert rank_memory(QWEN_SHAPE, plain) == rank_memory(QWEN_SHAPE, replace(plain, zero_stage=1))


def test_bfloat16_in_stage_1_keeps_the_gradients_of_a_pass_and_converts_them_one_by_one() -> None:
    load = replace(LOAD, dtype="bfloat16")
    of_a_pass, largest = 2 * QWEN_SHAPE.parameters, 4 * QWEN_SHAPE.largest_tensor

    rank = rank_memory(QWEN_SHAPE, load)
    assert (rank.of("gradients of a pass"), rank.of("a gradient in float32")) == (of_a_pass, largest)
    assert rank.of("activations") > 0  # beside the conversion: what a pass freed is still held

    for other in (replace(load, zero_stage=2), replace(load, offload_optimizer=True), LOAD):
        assert rank_memory(QWEN_SHAPE, other).of("gradients of a pass") == 0


def test_the_norm_of_a_rank_s_gradients_takes_its_largest_one_in_float64() -> None:
    load = replace(LOAD, device="gpu", dtype="bfloat16", zero_stage=2, ranks=8)
    tiny_share = replace(load, ranks=64)

    assert rank_memory(QWEN_SHAPE, load).of("a gradient in float64") == 8 * QWEN_SHAPE.largest_tensor
    assert rank_memory(QWEN_SHAPE, tiny_share).of("a gradient in float64") == 8 * QWEN_SHAPE.parameters // 64
    whole = rank_memory(QWEN_SHAPE, replace(load, zero_stage=3)).of("a gradient in float64")
    assert whole == QWEN_SHAPE.largest_tensor


def test_a_rank_that_gives_its_gpu_away_keeps_its_state_on_the_host() -> None:
    on_gpu = replace(LOAD, device="gpu", dtype="bfloat16", zero_stage=3, ranks=8)

    more = rank_memory(QWEN_SHAPE, replace(on_gpu, rests=True)).on("host") - rank_memory(
        QWEN_SHAPE, on_gpu
    ).on("host")
    assert more == 16 * QWEN_SHAPE.parameters // 8
