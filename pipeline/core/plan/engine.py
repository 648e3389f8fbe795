"""What an engine holds: weights, cache of keys and values, and what it computes with.

On a GPU vLLM takes a share u of the memory: weights and its own needs first, and the rest for the cache. On a CPU the
cache has the size that was asked for, and everything else comes on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.plan.kv_cache import (
    CONCURRENT_BATCHES,
    CPU_BLOCK,
    GPU_BLOCK,
    KvCache,
    kv_cache,
)
from pipeline.core.plan.memory import BYTES, GIB, Device, Dtype, Memory, memory
from pipeline.core.plan.shape import ModelShape

GPU_OVERHEAD = 3 * GIB
"""CUDA's context, activations of a step and CUDA graphs, of each device of an engine. An estimate."""
ENGINE_LIBRARIES = {"cpu": 1600 * 2**20, "gpu": 8 * GIB}
"""Of an engine's processes on the host (actor, scheduler, worker): Python, torch, vLLM. Measured on CPUs
(`bench.plan`); on GPUs an estimate."""
SCORED_BYTES = GIB
"""For logits and log-probabilities of a text that is scored, about. On a GPU they are outside of vLLM's own budget."""
GPU_LOGIT_ROWS = 1024
"""Positions of which vLLM takes them at once on GPUs (`vllm/v1/worker/gpu/sample/prompt_logprob.py`)."""


def scored_rows(vocabulary: int) -> int:
    """Positions of a text whose log-probabilities an engine takes at once, with logits in float32."""
    return max(1, SCORED_BYTES // (8 * vocabulary))


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What decides how much an engine holds, beside the model.

    Attributes:
        gpu_memory: bytes of a GPU; 0 on CPUs.
        gpu_share: u of them that the engine may take.
        cache_bytes: for keys and values on a CPU.
        batched_tokens: most that are computed in one step.
        scored_tokens: most of one text that is scored.
    """

    device: Device
    dtype: Dtype
    max_length: int
    concurrency: int
    batched_tokens: int
    scored_tokens: int
    gpu_memory: int = 0
    gpu_share: float = 0.0
    cache_bytes: int = 0
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """Memory of an engine on each of its devices, and the cache in it."""

    memory: Memory
    cache: KvCache


def engine_needs(shape: ModelShape, load: EngineLoad) -> EngineNeeds:
    """The peak of one engine, by component."""
    weights = BYTES[load.dtype] * shape.parameters // load.tensor_parallel
    on_gpu = load.device == "gpu"
    room = int(load.gpu_share * load.gpu_memory) - weights - GPU_OVERHEAD if on_gpu else load.cache_bytes
    cache = kv_cache(
        shape,
        room,
        max_length=load.max_length,
        element_bytes=BYTES[load.dtype],
        block_size=GPU_BLOCK if on_gpu else CPU_BLOCK,
        in_flight_tokens=load.batched_tokens * (CONCURRENT_BATCHES if on_gpu else 1),
        tensor_parallel=load.tensor_parallel,
    )
    if on_gpu:
        parts = memory(
            [
                ("weights", weights, "gpu"),
                ("KV cache", cache.bytes, "gpu"),
                ("context, activations, graphs", GPU_OVERHEAD, "gpu"),
                ("log-probabilities", _log_probabilities(shape, load), "gpu"),
                ("libraries", ENGINE_LIBRARIES["gpu"], "host"),
            ]
        )
    else:
        parts = memory(
            [
                ("weights", weights, "host"),
                ("packed embeddings", _packed_embeddings(shape, load), "host"),
                ("KV cache", cache.bytes, "host"),
                ("a step's activations", _step(shape, load), "host"),
                ("log-probabilities", _log_probabilities(shape, load), "host"),
                ("libraries", ENGINE_LIBRARIES["cpu"], "host"),
            ]
        )
    return EngineNeeds(parts, cache)


def _packed_embeddings(shape: ModelShape, load: EngineLoad) -> int:
    """vLLM packs matrices for oneDNN. Those of linear layers replace the weights, but of the embedding and of the
    output layer, one weight or two, both are kept (`VocabParallelEmbedding`, `dispatch_cpu_unquantized_gemm`)."""
    return 2 * BYTES[load.dtype] * shape.vocabulary * shape.hidden // load.tensor_parallel


def _step(shape: ModelShape, load: EngineLoad) -> int:
    """Of one layer without gradients: both halves of the feed-forward part and their product, and the residual stream
    twice."""
    return load.batched_tokens * BYTES[load.dtype] * (3 * shape.mlp + 2 * shape.hidden)


def _log_probabilities(shape: ModelShape, load: EngineLoad) -> int:
    """Logits and their normalised form in float32, of a piece of a text that is scored. Those of the tokens that are
    sampled are in vLLM's budget on a GPU."""
    rows = min(load.scored_tokens, scored_rows(shape.vocabulary))
    rows = max(rows, GPU_LOGIT_ROWS if load.device == "gpu" else load.concurrency)
    return rows * shape.vocabulary * (BYTES[load.dtype] + 4)
