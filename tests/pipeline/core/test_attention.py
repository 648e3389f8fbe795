"""A packed row gives each example what it would get alone: loss and gradients, for the usual architectures.

The variable-length kernel runs on GPUs only. Its place takes a reference of what torch documents of it, so that what is
tested are our arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core import attention as module
from pipeline.core.attention import PACKED, packed_attention, per_segment, takes_varlen, varlen
from pipeline.core.errors import UserError
from pipeline.core.prefixes import prefix_tree

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-sliding": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "llama": transformers.LlamaConfig(**SIZES, attention_dropout=0.0),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=256, query_pre_attn_scalar=200, sliding_window=4, layer_types=MIXED
    ),
}
MORE_THAN_A_WINDOW = {
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=4, layer_types=MIXED),
    "gpt-oss": transformers.GptOssConfig(
        **SIZES, head_dim=16, sliding_window=4, layer_types=MIXED, num_local_experts=2, num_experts_per_tok=1
    ),
}
LENGTHS = (11, 4, 1, 5, 7)
"""Of examples; some fill a window exactly, one is a token longer."""


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as it is documented, with one dense mask.

    Tensors are [tokens, heads, size]. Tokens of a segment see each other; `window_size` (left, right) is how many
    tokens before and behind their own, -1 for all.
    """
    segments = [torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff()) for cu in (cu_seq_q, cu_seq_k)]
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    distance = torch.arange(len(key))[None, :] - torch.arange(len(query))[:, None]
    seen = segments[0][:, None] == segments[1][None, :]
    left, right = window_size
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    heads, kv_heads = query.shape[1], key.shape[1]
    assert enable_gqa or heads == kv_heads
    kv_head = torch.arange(heads) // (heads // kv_heads)
    scores = torch.einsum("qhd,khd->hqk", query, key[:, kv_head])
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, value[:, kv_head])


@pytest.fixture(params=["varlen", "per_segment"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which of the two computes; that it did."""
    used: list[str] = []

    def noted(name: str, compute: Any) -> Any:
        return lambda *arguments: (used.append(name), compute(*arguments))[1]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(module, "takes_varlen", lambda *_: request.param == "varlen")
    monkeypatch.setattr(module, "varlen", noted("varlen", varlen))
    monkeypatch.setattr(module, "per_segment", noted("per_segment", per_segment))
    yield request.param
    assert set(used) == {request.param}


# ---------------------------------------------------------------- whole models


def tiny_model(config: Any, attention: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter)
    return model


EXAMPLES = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed over the tokens of one example."""
    return functional.cross_entropy(10 * logits[:-1], ids[1:], reduction="sum")


@cache
def each_alone(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of all examples and its gradients, by transformers' eager attention."""
    model = tiny_model((CONFIGS | MORE_THAN_A_WINDOW)[name], "eager")
    loss = sum(
        (loss_of(model(ids, use_cache=False).logits[0], ids[0]) for ids in EXAMPLES), start=torch.zeros(())
    )
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_as_each_alone(name: str, attention: str) -> None:
    model = tiny_model((CONFIGS | MORE_THAN_A_WINDOW)[name], attention)
    logits = model(
        torch.cat(EXAMPLES, dim=1),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        use_cache=False,
        **({"segment_lengths": LENGTHS} if attention == PACKED else {}),
    ).logits[0]
    rows = zip(logits.split(LENGTHS), EXAMPLES, strict=True)
    loss = sum((loss_of(row, ids[0]) for row, ids in rows), start=torch.zeros(()))
    loss.backward()

    expected, gradients = each_alone(name)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for parameter_name, parameter in model.named_parameters():
        theirs = gradients[parameter_name]
        tolerance = 1e-5 * max(1e-3, float(theirs.abs().max()))
        torch.testing.assert_close(parameter.grad, theirs, rtol=0, atol=tolerance, msg=parameter_name)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_loss_and_gradients_of_a_packed_row_equal_those_of_separate_examples(name: str, kernel: str) -> None:
    assert_as_each_alone(name, PACKED)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_so_do_those_of_a_row_in_which_common_beginnings_are_there_once(name: str, kernel: str) -> None:
    long = EXAMPLES[0][0]
    sequences = [long, long[:6], torch.cat([long[:6], long[:4]]), EXAMPLES[1][0], long]
    tree = prefix_tree([ids.int().numpy() for ids in sequences])
    assert len(tree.token_ids) == 11 + 4 + 4
    results = []
    for shares in (True, False):
        model = tiny_model(CONFIGS[name], PACKED if shares else "eager")
        if shares:
            row = model(
                torch.from_numpy(tree.token_ids)[None],
                position_ids=torch.from_numpy(tree.position_ids)[None],
                use_cache=False,
                segment_lengths=tree.lengths,
                branches=tree.branches,
            ).logits[0]
            rows = [row[torch.from_numpy(path)] for path in tree.paths]
        else:
            rows = [model(ids[None], use_cache=False).logits[0] for ids in sequences]
        loss = sum((loss_of(r, i) for r, i in zip(rows, sequences, strict=True)), start=torch.zeros(()))
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (ours, our_gradients), (expected, gradients) = results
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for found, theirs in zip(our_gradients, gradients, strict=True):
        tolerance = 1e-5 * max(1e-3, float(theirs.abs().max()))
        torch.testing.assert_close(found, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [*CONFIGS, "gemma2"])
def test_so_do_those_of_transformers_of_transformers_own_attention(name: str) -> None:
    assert_as_each_alone(name, "eager")


@pytest.mark.parametrize(("name", "keyword"), [("gemma2", "softcap"), ("gpt-oss", "s_aux")])
def test_a_model_that_asks_for_more_than_a_causal_window_is_refused(name: str, keyword: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"learner.attention: packed cannot .* \({keyword}\); set learner.attention=eager",
    ):
        assert_as_each_alone(name, PACKED)


# ---------------------------------------------------------------- the function itself


def inputs(tokens: int, heads: int = 4, kv_heads: int = 2, size: int = 8) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, heads, tokens, size), (1, kv_heads, tokens, size), (1, kv_heads, tokens, size))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6).map(tuple),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    size=st.sampled_from([8, 256]),
    scaling=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 3, 20, 100]),
    rows=st.sampled_from([1, 4, 128]),
)
def test_both_kernels_give_the_same_value_and_gradient(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    size: int,
    scaling: float | None,
    window: int | None,
    rows: int,
) -> None:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_ROWS", rows)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        for kernel in (varlen, per_segment):
            given_to = inputs(sum(lengths), *heads, size)
            output = kernel(*given_to, lengths, scaling, 0.0, window)
            output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape))
            found.append([output, *(x.grad for x in given_to)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def attend(**keywords: Any) -> Tensor:
    query, key, value = inputs(6)
    mask = keywords.pop("attention_mask", None)
    output, _ = packed_attention(nn.Identity(), query, key, value, mask, segment_lengths=(4, 2), **keywords)
    return output


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "position_bias"),
        ({"indices": torch.zeros(6), "softcap": 50.0}, "indices, softcap"),
        ({"is_causal": False}, "is_causal"),
        ({"something_new": 1}, "something_new"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "a mask of its own"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"packed cannot compute what Identity asks for \({named}\); set"):
        attend(**keywords)


def test_what_changes_nothing_is_let_through() -> None:
    positions = torch.arange(6)[None]
    found = attend(position_ids=positions, use_cache=False, softcap=None, is_causal=True)
    assert torch.equal(found, attend())


def test_the_variable_length_kernel_is_for_half_precision_on_gpus() -> None:
    def takes(dtype: torch.dtype, head: int, value_head: int, dropout: float = 0.0) -> bool:
        class OnGpu(Tensor):
            is_cuda = True  # type: ignore[assignment]

        query, value = (torch.empty(1, 1, 1, size, dtype=dtype) for size in (head, value_head))
        return takes_varlen(query.as_subclass(OnGpu), value, dropout)

    assert takes(torch.bfloat16, 256, 256) and takes(torch.float16, 8, 8)
    assert not takes(torch.float32, 64, 64)
    assert not takes(torch.bfloat16, 264, 264)
    assert not takes(torch.bfloat16, 192, 128)
    assert not takes(torch.bfloat16, 12, 12)
    assert not takes(torch.bfloat16, 64, 64, dropout=0.1)
    assert not takes_varlen(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16), torch.empty(1, 1, 1, 64), 0.0)
