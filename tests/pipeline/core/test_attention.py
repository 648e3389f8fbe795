"""A packed row gives each example what it would get alone: logits and gradients, for the usual architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pipeline.core.attention import PACKED

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-sliding": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "llama": transformers.LlamaConfig(**SIZES, attention_dropout=0.0),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=4),
}
LENGTHS = (11, 3, 1, 7)


def tiny_model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)


@pytest.mark.parametrize("attention", [PACKED, "eager"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_logits_and_gradients_equal_those_of_separate_examples(name: str, attention: str) -> None:
    examples = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    alone = tiny_model(name, "eager")
    expected = torch.cat([alone(e, use_cache=False).logits for e in examples], dim=1)
    expected.square().sum().backward()

    packed = tiny_model(name, attention)
    logits = packed(
        torch.cat(examples, dim=1),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        use_cache=False,
        **({"segment_lengths": LENGTHS} if attention == PACKED else {}),
    ).logits
    logits.square().sum().backward()

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    for (parameter_name, mine), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=parameter_name)
