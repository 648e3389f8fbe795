"""Optimiser steps of the learner under ZeRO 1, 2 and 3 on the device, against the same steps on the CPU in float32."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.learner import make_learner
from bench.gpu.models import TOKENIZER
from bench.gpu.rows import Row, at_most
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example

TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (2e-2, 1.0)}
"""Relative difference of the loss of any step, and of the whole change of the weights."""


def run(device: str, scratch: Path) -> list[Row]:
    expected = steps_in_process("cpu", "float32", 0, scratch / "cpu.pt")
    start = reference_weights()
    rows = []
    for dtype in ("float32", "bfloat16"):
        for stage in (1, 2, 3):
            found = steps_in_process(device, dtype, stage, scratch / f"{dtype}-{stage}.pt")
            loss = max(abs(a - b) / b for a, b in zip(found["losses"], expected["losses"], strict=True))
            change = sum(float((w - start[n]).square().sum()) for n, w in expected["weights"].items())
            error = sum(
                float((found["weights"][n].float() - w).square().sum())
                for n, w in expected["weights"].items()
            )
            name = f"ZeRO-{stage}, {dtype}, against the CPU"
            loss_bound, weight_bound = TOLERANCES[dtype]
            rows.append(at_most(f"{name}: loss, relative difference", loss, "", loss_bound))
            rows.append(
                at_most(
                    f"{name}: change of the weights, relative error",
                    (error / change) ** 0.5,
                    "",
                    weight_bound,
                )
            )
    return rows


def steps_in_process(device: str, dtype: str, stage: int, out: Path) -> dict:  # type: ignore[type-arg]
    """What `take_steps` finds, in a process of its own: a process group, and a choice of device, are for life."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    subprocess.run(
        [sys.executable, "-m", "bench.gpu.zero", str(out), dtype, str(stage)], env=environment, check=True
    )
    found: dict = torch.load(out)  # type: ignore[type-arg]
    return found


def take_steps(out: Path, dtype: str, stage: int) -> None:
    """Three optimiser steps on the shipped tiny model; losses and final weights to `out`."""
    config = LearnerConfig(
        zero_stage=stage,
        dtype=dtype,
        batch_size=8,
        tokens_per_microbatch=1024,
        learning_rate=1e-4,
        warmup_ratio=0.0,
    )
    learner = make_learner(config, TOKENIZER)
    report = learner.train(examples(), WeightedNll(), phase_seed=0)
    weights = {name: tensor.cpu() for bucket in learner.named_weights() for name, tensor in bucket}
    torch.save({"losses": [step["loss"] for step in report.history], "weights": weights}, out)
    learner.shutdown()


def examples() -> list[Example]:
    """24 short random examples for the tiny model's vocabulary, of different weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    made = []
    for number in range(24):
        length = int(rng.integers(60, 300))
        ids = rng.integers(2, 400, length).astype(np.int32)
        made.append(
            Example(
                f"q{number}",
                f"q{number}",
                "policy",
                ids,
                rng.random(length) < 0.4,
                {"weight": np.array([rng.uniform(0.1, 1.0)])},
            )
        )
    return made


def reference_weights() -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("stage", type=int)
    arguments = parser.parse_args()
    take_steps(arguments.out, arguments.dtype, arguments.stage)
