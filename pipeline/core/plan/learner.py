"""What a learner rank holds at its peak: DeepSpeed's states, what a packed row needs, and buffers.

P trained of F parameters on N ranks, E elements in the largest tensor, b bytes an element, rows of T tokens of which M
are trained. States, from the sources of DeepSpeed 0.19.8 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`runtime/bf16_optimizer.py`), with float32 sums of gradients (`learner_setup`):

| stage | weights | master copy and Adam | gradients | for the step | buckets |
|---|---|---|---|---|---|
| 0 | bF | 8P | 4P | | |
| 1, float32 | bF | 12P/N | 4P | 4P/N twice, 8E | elements of gradients x 4 |
| 1, bfloat16 | bF | 12P/N | 4P + 2P | 4E | |
| 2, float32 | bF | 12P/N | 4P/N | 4P/N twice, 8E | elements of gradients x b |
| 2, bfloat16 | bF | 12P/N | 4P/N | 4E, 8E | elements of gradients x b |
| 3 | bF/N | 12P/N | 4P/N | 8E/N | elements of gradients x b |

Stages 1 to 3 keep a float32 master copy even of float32 weights. Adam's two moments are 8 of the 12 bytes. The norm of
the gradients is computed in float64, one tensor after the other: 8E, of a rank's share at most. Stage 1 of bfloat16
weights is an optimiser of its own, unless its states are offloaded: it keeps the gradients of a pass from step to step.
On CPUs the last two columns need less (`_buckets`, `_step`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pipeline.core.losses.token_logprobs import CPU_LOGIT_CHUNK_BYTES, LOGIT_CHUNK_BYTES
from pipeline.core.plan.memory import ACCELERATOR_CONTEXT, BYTES, GIB, Device, Dtype, Memory, Where, memory
from pipeline.core.plan.shape import ModelShape

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: gradients that are summed over the ranks at once."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters that stage 3 keeps whole at a time."""
RANK_LIBRARIES = {"cpu": 450 * 2**20, "gpu": 4 * GIB}
"""Of the rank's own process on the host: Python, torch, DeepSpeed, transformers. Measured on CPUs (`bench.plan`); on
GPUs, where CUDA's libraries are loaded too, an estimate."""
Part = tuple[str, float, Where]


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What decides how much a rank holds, beside the model.

    Attributes:
        row_tokens: T, the token budget of a row.
        trained_tokens: M of them that are trained.
        lora_rank: of adapters; None where all parameters are trained.
        latent_channels: of all latent tasks' increments, their number times their rank.
        keeps_reference: the rank holds a frozen model beside the one that it trains.
        parts_apart: of a joint loss, whose gradients the rank holds each by itself.
        rests: the rank leaves the GPU to an engine between two trainings.
    """

    device: Device
    dtype: Dtype
    ranks: int
    zero_stage: int
    row_tokens: int
    trained_tokens: int
    checkpointing: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False
    lora_rank: int | None = None
    latent_channels: int = 0
    keeps_reference: bool = False
    parts_apart: int = 0
    rests: bool = False


def rank_memory(shape: ModelShape, load: RankLoad) -> Memory:
    """The peak of one rank, by component.

    On a GPU parts that are not needed at the same time are added all the same: the caching allocator keeps freed
    blocks, which seldom fit what is needed next. On CPUs (`actors.session.cpu_environment`) it is the worst moment: the
    output layer's turn, when no layer has given its activations back yet, or the end of a pass, or an optimiser step.
    In bfloat16 all is added there, too: the step converts gradients into blocks that are larger than what was freed
    just before, which goes back to the kernel after some seconds only (`actors.allocator`).
    """
    device = _device(load)
    passes = [*_activations(shape, load, device), *_output_layer(shape, load, device)]
    buckets, step = _buckets(shape, load, device), _step(shape, load, device)
    parts = _states(shape, load)
    if load.keeps_reference:  # whole on each rank, whatever the stage (`learner_setup.load_frozen`)
        parts.append(("reference", BYTES[load.dtype] * shape.parameters, device))
    if load.parts_apart:
        # Whole, too, with what is left of one and their sum (`without_conflicts`), in float32.
        parts.append(("gradients of the parts", 4 * (load.parts_apart + 2) * _trained(shape, load), device))
    if load.device == "gpu":
        parts += [*passes, *buckets, *step, ("CUDA and NCCL", ACCELERATOR_CONTEXT, "gpu")]
        if load.rests and not load.offload_optimizer:
            moved = 16 * _trained(shape, load) / load.ranks
            parts.append(("training state at rest", moved, "host"))
    elif load.dtype == "bfloat16":
        parts += [*passes, *buckets, *step]
    else:
        parts += max(passes, buckets, step, key=lambda moment: sum(size for _, size, _ in moment))
    return memory([*parts, ("libraries", RANK_LIBRARIES[load.device], "host")])


def model_states(shape: ModelShape, load: RankLoad) -> dict[Where, int]:
    """Weights, gradients and optimiser of one rank: what DeepSpeed's estimators call model states."""
    totals: dict[Where, int] = defaultdict(int)
    for _, size, where in _states(shape, load):
        totals[where] += round(size)
    return totals


def trained_parameters(shape: ModelShape, lora_rank: int | None, latent_channels: int = 0) -> int:
    """P. Adapters of all linear modules of a layer take rank x (inputs + outputs) each; latent tasks are such of the
    attention's output projection alone, beside whatever else is trained."""
    h, f, a, k = shape.hidden, shape.mlp, shape.attention, shape.key_value
    latent = shape.layers * latent_channels * (h + a)
    if lora_rank is None:
        return shape.parameters + latent
    return shape.layers * lora_rank * (2 * (h + a) + 2 * (h + k) + 3 * (h + f)) + latent


def _trained(shape: ModelShape, load: RankLoad) -> int:
    return trained_parameters(shape, load.lora_rank, load.latent_channels)


def stage_of(load: RankLoad) -> int:
    """The stage that runs: bfloat16 needs at least 1 (`learner_setup.deepspeed_config`)."""
    return max(load.zero_stage, 1) if load.dtype == "bfloat16" else load.zero_stage


def keeps_gradients(load: RankLoad) -> bool:
    """DeepSpeed's `BF16_Optimizer` runs (`runtime/engine.py`, `_do_optimizer_sanity_check`)."""
    return load.dtype == "bfloat16" and stage_of(load) == 1 and not load.offload_optimizer


def _states(shape: ModelShape, load: RankLoad) -> list[Part]:
    stage, device = stage_of(load), _device(load)
    trained = _trained(shape, load)
    weights = BYTES[load.dtype] * shape.parameters / (load.ranks if stage == 3 else 1)
    share = trained / (load.ranks if stage > 0 else 1)
    optimiser: Where = "host" if load.offload_optimizer else device
    gradients = share if stage >= 2 or load.offload_optimizer else trained
    return [
        ("weights", weights, "host" if load.offload_parameters else device),
        ("master copy", 4 * share if stage > 0 else 0, optimiser),
        ("Adam", 8 * share, optimiser),
        ("gradients", 4 * gradients, optimiser),
        ("gradients of a pass", 2 * trained if keeps_gradients(load) else 0, device),
    ]


def _device(load: RankLoad) -> Where:
    return "host" if load.device == "cpu" else "gpu"


# ---------------------------------------------------------------- activations


def saved_per_token(shape: ModelShape, dtype: Dtype) -> int:
    """Bytes that a decoder layer keeps of each token for its backward pass.

    Normalisations: input in float32, normalised, scaled, (4 + 2b) for each of their elements. Attention: queries,
    keys, values and output, once as the kernel gives it and once as the output projection reads it: (3a + 2k) b.
    Feed-forward: gate before and after its non-linearity, the other factor, their product: 4f b.
    """
    b = BYTES[dtype]
    norms = (4 + 2 * b) * shape.normalised
    return norms + b * (3 * shape.attention + 2 * shape.key_value) + b * 4 * shape.mlp


def _activations(shape: ModelShape, load: RankLoad, device: Where) -> list[Part]:
    """Of all layers, or under gradient checkpointing their inputs and what one of them recomputes; and the gradients
    inside a layer, 2f b and 2h b a token. Stage 3 gathers layers."""
    b, tokens = BYTES[load.dtype], load.row_tokens
    of_a_layer = tokens * saved_per_token(shape, load.dtype)
    live = b * min(LIVE_PARAMETERS, shape.parameters) if stage_of(load) == 3 and load.ranks > 1 else 0
    return [
        ("activations", 0 if load.checkpointing else shape.layers * of_a_layer, device),
        ("checkpoints", b * shape.layers * tokens * shape.hidden if load.checkpointing else 0, device),
        ("one layer", of_a_layer if load.checkpointing else 0, device),
        ("gradients inside a layer", tokens * b * (2 * shape.mlp + 2 * shape.hidden), device),
        ("gathered layers", live, device),
    ]


def _output_layer(shape: ModelShape, load: RankLoad, device: Where) -> list[Part]:
    """Logits of the trained tokens and their gradient: 2bMV; float32 pieces of them (`token_logprobs`)."""
    b, logits = BYTES[load.dtype], load.trained_tokens * shape.vocabulary
    chunk = CPU_LOGIT_CHUNK_BYTES if load.device == "cpu" else LOGIT_CHUNK_BYTES
    return [
        ("logits", 2 * b * logits + min(chunk, 4 * logits), device),
        ("gathered output layer", 2 * b * shape.largest_tensor if stage_of(load) == 3 else 0, device),
    ]


def _buckets(shape: ModelShape, load: RankLoad, device: Where) -> list[Part]:
    """On a GPU a bucket is there whole; the host gives a process only the pages that were written. There stage 1 moves
    its gradients into the bucket, one after the other."""
    stage, trained = stage_of(load), _trained(shape, load)
    if stage == 0 or (stage == 1 and load.device == "cpu") or keeps_gradients(load):
        return []
    elements = BUCKET_ELEMENTS if load.device == "gpu" else min(BUCKET_ELEMENTS, trained)
    return [("buckets", elements * (4 if stage == 1 else BYTES[load.dtype]), device)]


def _step(shape: ModelShape, load: RankLoad, device: Where) -> list[Part]:
    """Gradients in other formats, each as long as one tensor needs it; and, of float32 weights, the rank's share of
    them as one tensor that the optimiser steps with.

    Float32 gradients are copied twice on their way, into the rank's share and into that tensor. On CPUs only one of the
    copies is there beside what it was made from, and is larger than the float64 one, or takes its place.
    """
    stage = stage_of(load)
    if stage == 0 or load.offload_optimizer:
        return []
    share = _trained(shape, load) / load.ranks
    largest = min(shape.largest_tensor / (load.ranks if stage == 3 else 1), share)
    single, double = (
        ("a gradient in float32", 4 * largest, device),
        ("a gradient in float64", 8 * largest, device),
    )
    if keeps_gradients(load):
        return [single]
    if stage == 3:
        return [double]
    if load.dtype == "bfloat16":
        return [single, double]
    if load.device == "cpu":
        return [max(("gradients for the step", 4 * share, device), double, key=lambda part: part[1])]
    return [("gradients for the step", 2 * 4 * share, device), double]
