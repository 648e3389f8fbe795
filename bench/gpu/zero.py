"""Optimiser steps of the learner under ZeRO 1, 2 and 3 on the device, against the same steps on the CPU in float32."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.learner import make_learner
from bench.gpu.models import TOKENIZER
from bench.gpu.rows import Row, at_most
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example

TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (2e-2, 0.3)}
"""Relative difference of the loss of any step, and of the whole change of the weights, to the same format on a CPU."""
FIRST = 5e-3
"""Relative difference of the first step's loss to float32, when no weight has changed yet."""
Layout = tuple[str, int]
"""Number format and ZeRO stage."""
REFERENCES: dict[str, Layout] = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 1)}
ON_GPU: list[Layout] = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (1, 2, 3)]
ON_CPU: list[Layout] = [("bfloat16", 3)]


def run(device: str, scratch: Path) -> list[Row]:
    """Each number format against itself on a CPU: in bfloat16 most weights do not move in the first steps, since a step
    is smaller than half of the distance to the next number, until the float32 copy has moved far enough."""
    layouts = ON_GPU if device == "cuda" else ON_CPU
    runs = [*(("cpu", layout) for layout in REFERENCES.values()), *((device, layout) for layout in layouts)]
    float32, bfloat16, *found = steps_in_processes(runs, scratch)
    start = reference_weights()
    rows = []
    for (dtype, stage), one in zip(layouts, found, strict=True):
        name = f"ZeRO-{stage}, {dtype}, against the CPU"
        rows += compare(name, one, float32 if dtype == "float32" else bfloat16, start, *TOLERANCES[dtype])
        if dtype == "bfloat16":
            first = abs(one["losses"][0] / float32["losses"][0] - 1)
            rows.append(at_most(f"{name} in float32: first loss, relative difference", first, "", FIRST))
    return rows


def compare(
    name: str,
    found: dict[str, Any],
    expected: dict[str, Any],
    start: dict[str, torch.Tensor],
    loss_bound: float,
    weight_bound: float,
) -> list[Row]:
    loss = max(abs(a - b) / b for a, b in zip(found["losses"], expected["losses"], strict=True))
    change = sum(float((w.float() - start[n]).square().sum()) for n, w in expected["weights"].items())
    error = sum(
        float((found["weights"][n].float() - w.float()).square().sum())
        for n, w in expected["weights"].items()
    )
    return [
        at_most(f"{name}: loss, relative difference", loss, "", loss_bound),
        at_most(f"{name}: change of the weights, relative error", (error / change) ** 0.5, "", weight_bound),
    ]


def steps_in_processes(runs: list[tuple[str, Layout]], scratch: Path) -> list[dict[str, Any]]:
    """What `take_steps` finds for each (device, layout), all at once, in processes of their own: a process group, and a
    choice of device, are for life."""
    processes = []
    for number, (device, (dtype, stage)) in enumerate(runs):
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        command = [sys.executable, "-m", "bench.gpu.zero", str(scratch / f"{number}.pt"), dtype, str(stage)]
        processes.append(subprocess.Popen(command, env=environment))
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [torch.load(scratch / f"{number}.pt") for number in range(len(runs))]


def take_steps(out: Path, dtype: Any, stage: Any) -> None:
    """Three optimiser steps on the shipped tiny model; losses, and weights afterwards, to `out`."""
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
                {"log_weight": np.log([rng.uniform(0.1, 1.0)])},
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
