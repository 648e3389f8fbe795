"""M-step: total tokens per second of the packed DeepSpeed learner against a plain torch loop with padded batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench.measure import Ratio, in_turn
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example

if TYPE_CHECKING:
    from actors.learner import Learner

NUM_EXAMPLES, BATCH = 96, 32
PADDED_MICROBATCH = 8
ALIKE = "M-step, 1 rank, 4 trajectories of a question begin alike (0.45)"


def run() -> list[Ratio]:
    """One rank with all cores, float32, the size of the demo's model and trajectories."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        save_model(model)
        learner, ratios = make_learner(model), []
        for what, examples in (("M-step, 1 rank", make_examples()), (ALIKE, make_examples(common=0.45))):
            ours, limit = in_turn(partial(_packed, learner, examples), padded(model, examples))
            ratios.append(Ratio(what, "plain torch loop, padded", "tokens", ours, limit, goal=1.3))
        learner.shutdown()
    return ratios


def _packed(learner: Learner, examples: list[Example]) -> float:
    return learner.train(examples, WeightedNll(), phase_seed=0).total_tokens_per_s


def save_model(path: Path, hidden: int = 256, layers: int = 4) -> None:
    """A random model of this size, with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    ).save_pretrained(path)


def make_examples(common: float = 0.0) -> list[Example]:
    """Lengths from 200 to 500 tokens, a third of them trained; four are of one question, and begin with this share of
    their tokens in common."""
    rng = np.random.default_rng(0)
    examples: list[Example] = []
    for number in range(NUM_EXAMPLES):
        length = int(rng.integers(200, 501))
        mask = np.arange(length) % 100 >= 65
        ids = rng.integers(0, 1024, length).astype(np.int32)
        weight = np.log([rng.uniform(0.5, 1.0)])
        if number % 4:
            first = examples[number - number % 4].token_ids
            alike = int(common * min(length, len(first)))
            ids[:alike] = first[:alike]
        name = f"q{number // 4}/{number % 4}"
        examples.append(Example(name, f"q{number // 4}", "policy", ids, mask, {"log_weight": weight}))
    return examples


def make_learner(model: Path) -> Learner:
    """One rank in this process."""
    from actors.learner import Learner

    config = LearnerConfig(batch_size=BATCH, dtype="float32", zero_stage=0, tokens_per_microbatch=4096)
    return Learner(config, model)


def padded(model: Path, examples: Sequence[Example]) -> Callable[[], float]:
    """A plain torch loop over them in this process; each call of it gives the tokens per second of one epoch."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-6)

    def epoch() -> float:
        start = time.perf_counter()
        for first in range(0, len(examples), BATCH):
            batch = examples[first : first + BATCH]
            for at in range(0, len(batch), PADDED_MICROBATCH):
                network(**_pad(batch[at : at + PADDED_MICROBATCH]), use_cache=False).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return sum(len(e.token_ids) for e in examples) / (time.perf_counter() - start)

    return epoch


def _pad(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    shape = len(batch), max(len(e.token_ids) for e in batch)
    ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, example in enumerate(batch):
        length, mask = len(example.token_ids), torch.from_numpy(example.loss_mask)
        ids[row, :length] = torch.from_numpy(example.token_ids.astype(np.int64))
        attention[row, :length] = 1
        labels[row, :length][mask] = ids[row, :length][mask]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}
