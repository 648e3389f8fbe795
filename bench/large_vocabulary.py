"""Engine and learner of a model with a large vocabulary, against the matrix products that they cannot do without.

The model has the shape of Gemma 3 270M (18 layers, 262,144 tokens) and random weights, on all cores: the engine in
bfloat16, the learner in both number formats. The limit is the time of the products alone, in the same format: for the
engine every matrix with the tokens of all prompts at once, then for each further token with a row per request; for the
learner forward, backward and the weights' gradients, the output layer for trained tokens only. Attention, norms,
activations, sampling and the optimiser are not in it.

The learner and its products run in a process of their own that has an actor's environment.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from actors.session import cpu_environment
from bench.gpu.generation import PROMPT, TURN, generate, random_prompts
from bench.gpu.hosted import engine_options, hosted
from bench.gpu.learner import make_learner
from bench.gpu.models import copy_tokenizer
from bench.measure import Brevity, Ratio, in_turn
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example
from retriever_service.linear import OneDnnLinear
from retriever_service.machine import available_cores

REQUESTS, FEW = 32, 4
ROW, ROWS = 1_536, 2
TRAINED = 1 / 4
GOAL = 0.6

Format = Literal["bfloat16", "float32"]
FORMATS: tuple[Format, ...] = "bfloat16", "float32"
SPAWN = multiprocessing.get_context("spawn")
Products = Counter[tuple[int, int, int]]
"""How often rows x inputs times inputs x outputs is computed."""


def run() -> list[Ratio]:
    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2_048, num_hidden_layers=2 if Brevity.is_on else 18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(scratch)
        copy_tokenizer(Path(scratch))
        model, ratios = Path(scratch), [_engine(Path(scratch), config)]
        for dtype in FORMATS:
            with _environment(cpu_environment()), ProcessPoolExecutor(1, SPAWN) as process:
                ratios.append(process.submit(_learner, model, config, dtype, Brevity.is_on).result())
        return ratios


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Of the processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _engine(model: Path, config: Gemma3TextConfig) -> Ratio:
    requests = FEW if Brevity.is_on else REQUESTS
    options = engine_options(model, "cpu", dtype="bfloat16", max_num_seqs=requests, kv_cache_gib=1.0)
    steps = Counter({requests * PROMPT: 1, requests: TURN - 1})
    products = Counter[tuple[int, int, int]]()
    for rows, times in steps.items():
        for inputs, outputs in _matrices(config):
            products[rows, inputs, outputs] += times
    products[requests, config.hidden_size, config.vocab_size] += TURN
    seeds = itertools.count()
    with hosted(options) as host:

        def ours() -> float:
            prompts = random_prompts(config.vocab_size, requests, next(seeds))
            return requests * TURN / generate(host, prompts, requests)

        rates, limits = in_turn(ours, lambda: requests * TURN / _seconds(products, torch.bfloat16))
    return Ratio("engine, Gemma 3 270M, bfloat16", "its matrix products alone", "tokens", rates, limits, GOAL)


def _learner(model: Path, config: Gemma3TextConfig, dtype: Format, is_brief: bool) -> Ratio:
    Brevity.is_on = is_brief  # of the process that asks
    random = np.random.default_rng(0)
    mask = np.arange(ROW) % 100 >= 100 * (1 - TRAINED)
    examples = [
        Example(f"q{n}", f"q{n}", "policy", random.integers(2, config.vocab_size, ROW).astype(np.int32), mask,
                {"log_weight": np.zeros(1)})
        for n in range(ROWS)
    ]  # fmt: skip
    products = Counter[tuple[int, int, int]]()
    for rows, inputs, outputs in [
        *((ROW, *matrix) for matrix in _matrices(config)),
        (int(mask[1:].sum()), config.hidden_size, config.vocab_size),
    ]:
        products[rows, inputs, outputs] += ROWS
        products[rows, outputs, inputs] += ROWS
        products[inputs, rows, outputs] += ROWS
    learner = make_learner(
        LearnerConfig(zero_stage=0, dtype=dtype, batch_size=ROWS, tokens_per_microbatch=ROW), model
    )
    torch.set_num_threads(available_cores())
    ours, limit = in_turn(
        lambda: learner.train(examples, WeightedNll(), phase_seed=0).total_tokens_per_s,
        lambda: ROWS * ROW / _seconds(products, getattr(torch, dtype)),
    )
    learner.shutdown()
    return Ratio(f"learner, Gemma 3 270M, {dtype}", "its matrix products alone", "tokens", ours, limit, GOAL)


def _matrices(config: Gemma3TextConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of every matrix that all tokens pass through."""
    hidden, inner, head = (int(n) for n in (config.hidden_size, config.intermediate_size, config.head_dim))
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    return layer * int(config.num_hidden_layers)


def _seconds(products: Products, dtype: torch.dtype) -> float:
    """Of each kind one is measured, some times in turn; in float32 by torch and by oneDNN, and the faster counts."""
    total = 0.0
    for (rows, inputs, outputs), times in products.items():
        a, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        layers: list[nn.Linear] = [nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)]
        if dtype == torch.float32:
            layers.append(OneDnnLinear(inputs, outputs, bias=False, device="meta"))
        total += times * min(_seconds_of(layer, weight, a, min(times, 3)) for layer in layers)
    return total


@torch.no_grad()
def _seconds_of(layer: nn.Linear, weight: torch.Tensor, rows: torch.Tensor, repeats: int) -> float:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer(rows)
    start = time.perf_counter()
    for _ in range(repeats):
        layer(rows)
    return (time.perf_counter() - start) / repeats
