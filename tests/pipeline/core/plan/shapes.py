"""Models of the reference table, as transformers describes them, and their shapes as literals."""

from __future__ import annotations

from typing import Any

from pipeline.core.plan.memory import GIB
from pipeline.core.plan.shape import ModelShape

QWEN_7B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3_584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
"""Qwen2.5-7B-Instruct's config.json, as far as it has to do with sizes."""
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
"""Llama-3.1-8B-Instruct's."""
QWEN_SHAPE = ModelShape(
    parameters=7_615_616_512,
    largest_tensor=152_064 * 3_584,
    layer_parameters=233_057_792,
    layers=28,
    hidden=3_584,
    mlp=18_944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    normalised=2 * 3_584,
    vocabulary=152_064,
    windows=(None,) * 28,
)
LLAMA_SHAPE = ModelShape(
    parameters=8_030_261_248,
    largest_tensor=128_256 * 4_096,
    layer_parameters=218_112_000,
    layers=32,
    hidden=4_096,
    mlp=14_336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    normalised=2 * 4_096,
    vocabulary=128_256,
    windows=(None,) * 32,
)


def in_gib(size: float) -> float:
    return size / GIB
