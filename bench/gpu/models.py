"""Models with random weights, in the shapes of known ones, and the arithmetic of what they compute."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.rows import Size
from pipeline.core.records import Example

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny-searcher"
"""Any tokenizer does: what is measured gets token ids."""

SHAPES: dict[Size, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "7b": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen3's architecture: its published 0.6B and 8B."""


def random_model(directory: Path, size: Size, device: str) -> Path:
    """A model directory with random bfloat16 weights, the same for the same device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SHAPES[size], max_position_embeddings=131072, dtype="bfloat16", eos_token_id=1, bos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    copy_tokenizer(directory)
    return directory


def copy_tokenizer(directory: Path) -> None:
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, directory)


def random_examples(
    size: Size, *, count: int, shortest: int, longest: int, trained_share: float = 1 / 3
) -> list[Example]:
    """Examples of random ids; a share of each run of 100 tokens is trained."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        length = int(rng.integers(shortest, longest + 1))
        ids = rng.integers(2, SHAPES[size]["vocab_size"], length).astype(np.int32)
        mask = np.arange(length) % 100 >= 100 * (1 - trained_share)
        examples.append(Example(f"q{number}", f"q{number}", "policy", ids, mask, {"log_weight": np.zeros(1)}))
    return examples


def linear_parameters(size: Size) -> int:
    """Parameters of all matrices that every token passes through; embedding and output layer are not among them."""
    shape = SHAPES[size]
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = hidden * head * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    return int(shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"]))


def all_parameters(size: Size) -> int:
    """Parameters but for norms."""
    shape = SHAPES[size]
    tables = 1 if shape["tie_word_embeddings"] else 2
    return linear_parameters(size) + int(tables * shape["vocab_size"] * shape["hidden_size"])


def training_flops(size: Size, examples: list[Example], *, frozen_base: bool) -> float:
    """Model FLOPs of one pass over the examples, forward and backward, recomputation not counted.

    Two per parameter and token forward, twice that backward (once that where the base is frozen: gradients go
    through the matrices, not into them); the output layer for trained tokens only; causal attention over each
    example's own length.
    """
    shape = SHAPES[size]
    tokens = sum(len(e.token_ids) for e in examples)
    trained = sum(int(e.loss_mask[1:].sum()) for e in examples)
    passes = 2 if frozen_base else 3
    matrices = (
        2 * passes * (linear_parameters(size) * tokens + shape["vocab_size"] * shape["hidden_size"] * trained)
    )
    width = shape["num_attention_heads"] * shape["head_dim"]
    squares = sum(len(e.token_ids) ** 2 for e in examples)
    return float(matrices + 3 * 2 * width * shape["num_hidden_layers"] * squares)
