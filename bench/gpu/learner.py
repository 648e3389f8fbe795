"""Speed and memory of the learner: tokens per second, FLOP utilisation, peak memory against the predicted one."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.learner import Learner
from bench.gpu.limits import matmul_rate
from bench.gpu.models import random_examples, random_model, training_flops
from bench.gpu.rows import Row, Size, at_most
from pipeline.core.config import LearnerConfig, LoraConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.plan.learner import RankLoad, rank_memory
from pipeline.core.plan.shape import read_shape
from pipeline.core.records import Example

GIB = 2**30


def make_learner(config: LearnerConfig, model: Path) -> Learner:
    """A learner of one rank in this process."""
    return Learner(config, model)


def run_small(device: str, scratch: Path) -> list[Row]:
    """Full fine-tuning of 0.6B, in rows of 16,384 tokens, and of 65,536 as in prime-rl's published figure (26.8 % of an
    H100's nominal FLOP/s)."""
    return [
        row
        for tokens in ((16_384, 65_536) if device == "cuda" else (512,))
        for row in run_rows(tokens, device, scratch / str(tokens))
    ]


def run_rows(row: int, device: str, scratch: Path) -> list[Row]:
    size: Size = "0.6b" if device == "cuda" else "tiny"
    examples = random_examples(
        size, count=64 if device == "cuda" else 8, shortest=row // 16, longest=row // 4
    )
    config = LearnerConfig(
        zero_stage=2, dtype="bfloat16", batch_size=len(examples) // 2, tokens_per_microbatch=row,
        gradient_checkpointing=True,
    )  # fmt: skip
    return measure(size, config, examples, device, scratch)


def run_large(device: str, scratch: Path) -> list[Row]:
    """LoRA on 8B, rows of 8,192 tokens: what one GPU of 80 GB can hold."""
    size: Size = "7b" if device == "cuda" else "tiny"
    row = 8_192 if device == "cuda" else 512
    examples = random_examples(size, count=32 if device == "cuda" else 8, shortest=row // 8, longest=row // 2)
    config = LearnerConfig(
        zero_stage=2, dtype="bfloat16", batch_size=len(examples) // 2, tokens_per_microbatch=row,
        gradient_checkpointing=True, lora=LoraConfig(rank=16),
    )  # fmt: skip
    return measure(size, config, examples, device, scratch)


def measure(
    size: Size, config: LearnerConfig, examples: list[Example], device: str, scratch: Path
) -> list[Row]:
    learner = make_learner(config, random_model(scratch / "model", size, device))
    learner.train(examples[: config.batch_size], WeightedNll(), phase_seed=0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    report = learner.train(examples, WeightedNll(), phase_seed=1)
    lora = config.lora is not None
    name = f"learner, {size}{', LoRA' if lora else ''}, rows of {config.tokens_per_microbatch} tokens"
    flops = training_flops(size, examples, frozen_base=lora) / report.seconds
    rows = [
        Row(f"{name}: tokens", report.total_tokens_per_s, "tokens/s"),
        Row(f"{name}: model FLOPs", flops / 1e12, "TFLOP/s"),
        Row(f"{name}: of a plain bfloat16 matrix product", 100 * flops / matmul_rate(device), "%"),
        Row(f"{name}: rows filled", 100 * report.pack_fill, "%"),
    ]
    if device == "cuda":
        if (peak_flops := nominal_flops(torch.cuda.get_device_name())) is not None:
            rows.append(
                Row(f"{name}: of the nominal {peak_flops / 1e12:.0f} TFLOP/s", 100 * flops / peak_flops, "%")
            )
        peak = torch.cuda.max_memory_allocated() / GIB
        predicted = predicted_memory(scratch / "model", config, examples) / GIB
        rows += [
            Row(f"{name}: peak memory", peak, "GiB"),
            Row(f"{name}: planned peak memory", predicted, "GiB"),
            at_most(f"{name}: measured peak memory / planned", peak / predicted, "", 1.1),
        ]
    learner.shutdown()
    return rows


def nominal_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s by the maker's data sheet, of GPUs that are known here."""
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
    return next((flops for name, flops in known.items() if name in device_name), None)


def predicted_memory(model: Path, config: LearnerConfig, examples: list[Example]) -> int:
    """Peak bytes of the only rank on its GPU, as `exsearch plan` has them, but for what is no tensor of torch's."""
    trained = sum(int(e.loss_mask.sum()) for e in examples) / sum(len(e.token_ids) for e in examples)
    planned = rank_memory(
        read_shape(str(model)),
        RankLoad(
            device="gpu",
            dtype="bfloat16",
            ranks=1,
            zero_stage=config.zero_stage,
            row_tokens=config.tokens_per_microbatch,
            trained_tokens=round(trained * config.tokens_per_microbatch),
            checkpointing=config.gradient_checkpointing,
            lora_rank=config.lora.rank if config.lora is not None else None,
        ),
    )
    return planned.on("gpu") - planned.of("CUDA and NCCL")
