"""The inference engine: start, greedy generation and scoring against a plain float32 forward pass on the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench.gpu.hosted import HostedEngine, engine_options, hosted
from bench.gpu.models import TOKENIZER
from bench.gpu.rows import Row, at_least, at_most
from pipeline.core.agents.program import Sampling
from pipeline.core.models import load_tokenizer

QUESTIONS = [
    "Who founded the maker of the Silver Harp?",
    "In which city was the author of The Winter Orchard born?",
    "Which river flows through the town where Orvane Mills stands?",
    "Were the two bridges opened in the same year?",
]
NEW_TOKENS = 48
TOLERANCES = {"float32": 0.03, "bfloat16": 0.25}
"""Largest difference of one token's log-probability, in nats."""


def greedy(max_tokens: int) -> Sampling:
    return Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=max_tokens, seed=0, stop=())


def run(device: str, scratch: Path) -> list[Row]:
    tokenizer = load_tokenizer(str(TOKENIZER))
    prompts = [tokenizer(f"Question: {question}\n<think>").input_ids for question in QUESTIONS]
    reference = Reference(TOKENIZER)
    rows = []
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        options = engine_options(TOKENIZER, device, dtype=dtype)
        started = time.perf_counter()
        with hosted(options) as host:
            rows.append(Row(f"engine, {dtype}: start", time.perf_counter() - started, "s"))
            rows += check(host, dtype, prompts, reference)
    return rows


class Reference:
    """The model in transformers, float32, on the CPU."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, token_ids: list[int], start: int) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) for each i >= start."""
        ids = torch.tensor(token_ids)
        table = self.model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        picked: list[float] = table.gather(1, ids[start:, None])[:, 0].tolist()
        return picked

    @torch.no_grad()
    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        output = self.model.generate(
            torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        continuation: list[int] = output[0, len(token_ids) :].tolist()
        return continuation


def check(host: HostedEngine, dtype: str, prompts: list[list[int]], reference: Reference) -> list[Row]:
    same, generated, uncached, cached = [], 0.0, 0.0, 0.0
    for prompt in prompts:
        completion = host.run(host.engine.generate(prompt, greedy(NEW_TOKENS)))
        expected = reference.greedy(prompt, len(completion.token_ids))
        same += [a == b for a, b in zip(completion.token_ids, expected, strict=True)]
        whole = prompt + completion.token_ids
        generated = max(generated, distance(completion.logprobs, reference.logprobs(whole, len(prompt))))
        # Another continuation than the engine's own, as a gold answer is: first cold, then on the cached prompt.
        other = prompt + list(reversed(completion.token_ids))
        exact = reference.logprobs(other, len(prompt))
        uncached = max(uncached, distance(host.run(host.engine.token_logprobs(other, len(prompt))), exact))
        cached = max(cached, distance(host.run(host.engine.token_logprobs(other, len(prompt))), exact))
    bound = TOLERANCES[dtype]
    what = f"engine, {dtype}: largest difference of a log-probability"
    return [
        at_least(f"engine, {dtype}: greedy tokens equal to float32 on the CPU", sum(same) / len(same), "",
                 1.0 if dtype == "float32" else 0.0),
        at_most(f"{what}, generated", generated, "nats", bound),
        at_most(f"{what}, scored", uncached, "nats", bound),
        at_most(f"{what}, scored again from the cache", cached, "nats", bound),
    ]  # fmt: skip


def distance(values: list[float], exact: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(values, exact, strict=True))
