"""Tokens of a cache, against vLLM's own accounting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from pipeline.core.plan.kv_cache import kv_cache
from pipeline.core.plan.shape import shape_of
from tests.pipeline.core.plan.shapes import LLAMA_SHAPE, QWEN_SHAPE

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
}
QWEN = Qwen2Config(num_hidden_layers=4, num_key_value_heads=2, architectures=["Qwen2ForCausalLM"], **SMALL)
LLAMA = LlamaConfig(num_hidden_layers=3, num_key_value_heads=1, architectures=["LlamaForCausalLM"], **SMALL)
GEMMA: dict[str, Any] = {
    "num_key_value_heads": 1,
    "head_dim": 64,
    "architectures": ["Gemma3ForCausalLM"],
    **SMALL,
}


@pytest.mark.component
@pytest.mark.parametrize(
    ("config", "max_length", "batched_tokens"),
    [
        (QWEN, 1_536, 4_096),
        (LLAMA, 1_000, 4_096),
        (Gemma3TextConfig(num_hidden_layers=18, sliding_window=512, **GEMMA), 4_096, 4_096),
        (Gemma3TextConfig(num_hidden_layers=18, sliding_window=512, **GEMMA), 8_192, 1_024),
        # 5 and 2, and 5 and 4 layers: a last group with padding, and groups as large as the larger kind.
        (Gemma3TextConfig(num_hidden_layers=7, layer_types=["sliding_attention"] * 5 + ["full_attention"] * 2,
                          sliding_window=256, **GEMMA), 2_048, 512),
        (Gemma3TextConfig(num_hidden_layers=9, layer_types=["sliding_attention"] * 5 + ["full_attention"] * 4,
                          sliding_window=256, **GEMMA), 2_048, 512),
    ],
)  # fmt: skip
def test_the_cache_is_what_vllm_makes_of_the_memory(
    tmp_path: Path, config: PretrainedConfig, max_length: int, batched_tokens: int
) -> None:
    size, shape = 300 * 2**20, shape_of(config)
    config.save_pretrained(tmp_path)

    theirs = _by_vllm(tmp_path, config, size, max_length, batched_tokens)
    ours = kv_cache(
        shape,
        size,
        max_length=max_length,
        element_bytes=4,
        block_size=theirs["block_size"],
        in_flight_tokens=theirs["in_flight_tokens"],
    )

    assert (ours.bytes, ours.request_bytes, ours.tokens) == (
        theirs["bytes"],
        theirs["request_bytes"],
        theirs["tokens"],
    )


def _by_vllm(path: Path, config: Any, size: int, max_length: int, batched_tokens: int) -> dict[str, int]:
    """What vLLM's engine core computes when it starts, with the layers' specifications that its models report."""
    import torch
    from vllm import EngineArgs
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    vllm = EngineArgs(
        model=str(path),
        dtype="float32",
        max_model_len=max_length,
        max_num_batched_tokens=batched_tokens,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    vllm.cache_config.kv_cache_layout = "LBHNC"  # layers outside, as its attention on CPUs wants it
    layer: dict[str, Any] = {
        "block_size": vllm.cache_config.block_size,
        "num_kv_heads": config.num_key_value_heads,
        "head_size": shape_of(config).head_dim,
        "dtype": torch.float32,
    }
    specs: dict[str, Any] = {
        str(number): FullAttentionSpec(**layer)
        if window is None
        else SlidingWindowSpec(sliding_window=window, **layer)
        for number, window in enumerate(shape_of(config).windows)
    }
    groups = kv_cache_utils.get_kv_cache_groups(vllm, specs)
    made = kv_cache_utils.get_kv_cache_config_from_groups(vllm, groups, size)
    return {
        "block_size": vllm.cache_config.block_size,
        "in_flight_tokens": vllm.max_in_flight_tokens,
        "bytes": made.kv_cache_tensors[0].size,
        "request_bytes": kv_cache_utils._max_memory_usage_bytes_from_groups(vllm, groups),
        "tokens": kv_cache_utils.get_kv_cache_capacity(vllm, made)[0],
    }


def cache(shape: Any, size: int, **options: Any) -> Any:
    arguments = {"max_length": 8_192, "element_bytes": 2, "block_size": 16, "in_flight_tokens": 16_384}
    return kv_cache(shape, size, **(arguments | options))


def test_devices_of_an_engine_divide_the_heads() -> None:
    alone, of_four = (cache(LLAMA_SHAPE, 2**30, tensor_parallel=n) for n in (1, 4))

    assert of_four.tokens == 4 * alone.tokens


def test_heads_that_are_too_few_are_copied() -> None:
    assert (
        cache(QWEN_SHAPE, 2**30, tensor_parallel=8).tokens
        == cache(QWEN_SHAPE, 2**30, tensor_parallel=4).tokens
    )


def test_a_window_makes_long_requests_cheaper() -> None:
    windowed = replace(QWEN_SHAPE, windows=(1_024, None) * 14)

    assert (
        cache(windowed, 2**30, in_flight_tokens=1_024).tokens
        > 1.5 * cache(QWEN_SHAPE, 2**30, in_flight_tokens=1_024).tokens
    )


@pytest.mark.parametrize("size", [0, -5 * 2**30])
def test_no_room_is_no_token(size: int) -> None:
    assert (cache(QWEN_SHAPE, size).bytes, cache(QWEN_SHAPE, size).tokens) == (0, 0)
