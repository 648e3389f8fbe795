"""How many tokens an engine's cache of keys and values holds: vLLM's accounting, as arithmetic.

The source is `vllm/v1/core/kv_cache_utils.py` of vLLM 0.32. The cache is a pool of blocks. A block holds `block_size`
tokens of a *group* of layers. Layers that attend to everything are of one kind, layers with a sliding window of
another; a model of both kinds has groups of equally many layers, the fewest of any kind (or the most, where that is
less than half as much again). Each group takes blocks of its own from the pool, so all blocks are of one size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil

from pipeline.core.plan.shape import ModelShape

GPU_BLOCK, CPU_BLOCK = 16, 128
"""Tokens of a block, vLLM's default."""
CONCURRENT_BATCHES = 2
"""Of vLLM's asynchronous scheduler on GPUs: tokens of so many steps may be under way."""


@dataclass(frozen=True, slots=True)
class KvCache:
    """A cache of a given size.

    Attributes:
        token_bytes: of keys and values of a token in all layers.
        request_bytes: what one request of the greatest length takes; vLLM refuses to start with less.
        tokens: that the cache holds, in requests of the greatest length.
    """

    bytes: int
    token_bytes: int
    request_bytes: int
    tokens: int


def kv_cache(
    shape: ModelShape,
    size: int,
    *,
    max_length: int,
    element_bytes: int,
    block_size: int,
    in_flight_tokens: int,
    tensor_parallel: int = 1,
) -> KvCache:
    """The cache of one device.

    Keys and values of a token in one layer are 2 x (KV heads of the device) x head size elements. Heads are divided
    among `tensor_parallel` devices, and copied where there are fewer heads than devices.

    Args:
        size: bytes for keys and values, on each of the engine's devices.
        max_length: tokens of the longest request.
        in_flight_tokens: that may be computed at once: a sliding window keeps them all.
    """
    heads = max(1, shape.kv_heads // tensor_parallel)
    layer_bytes = 2 * heads * shape.head_dim * element_bytes
    kinds = Counter(shape.windows)
    group = _layers_of_a_group(list(kinds.values()))
    block_bytes = group * block_size * layer_bytes
    blocks_per_request = 0
    for window, layers in kinds.items():
        blocks = ceil(max_length / block_size)
        if window is not None:
            # The window need not begin where a block does.
            blocks = ceil(min(window - 1 + in_flight_tokens, max_length) / block_size) + 1
        blocks_per_request += ceil(layers / group) * blocks
    num_blocks = max(0, size) // block_bytes
    return KvCache(
        bytes=num_blocks * block_bytes,
        token_bytes=shape.layers * layer_bytes,
        request_bytes=blocks_per_request * block_bytes,
        tokens=int(num_blocks / blocks_per_request * max_length),
    )


def _layers_of_a_group(kinds: list[int]) -> int:
    """Of kinds with so many layers each."""
    return max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)
