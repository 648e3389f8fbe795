"""The plan's memory against real processes on CPUs.

    python -m bench.plan [--directory DIR] [--all] [3M] [60M] [250M]

Qwen2-architecture models with random weights. A learner rank trains a few steps on full rows, an engine serves and
scores more requests than it takes at once; both as in a run's actors, one after the other. Prints a Markdown table:
most anonymous memory (`bench.peaks`), predicted and measured, and of what the prediction is made.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.engine_options import batched_tokens
from bench.measure import print_table
from bench.peaks import measure
from pipeline.core.plan.engine import EngineLoad, engine_needs
from pipeline.core.plan.learner import RankLoad, rank_memory
from pipeline.core.plan.memory import GIB, Memory
from pipeline.core.plan.shape import ModelShape, read_shape

MODELS = {
    "3M": (512, 256, 768, 4, 4, 2),
    "60M": (32_000, 512, 2_816, 8, 8, 4),
    "250M": (64_000, 1_024, 4_096, 12, 16, 4),
}
"""Vocabulary, hidden size, feed-forward size, layers, heads, KV heads."""
ROW, TRAINED, STEPS = 2_048, 256, 3
RANK = RankLoad(
    device="cpu",
    dtype="float32",
    ranks=1,
    zero_stage=1,
    row_tokens=ROW,
    trained_tokens=TRAINED,
    checkpointing=False,
)
RANKS = {
    "rank": RANK,
    "rank, ZeRO-0": replace(RANK, zero_stage=0),
    "rank, checkpointing": replace(RANK, checkpointing=True),
    "rank, bfloat16, ZeRO-2": replace(RANK, dtype="bfloat16", zero_stage=2),
}
PROMPT, ANSWER, REQUESTS, CONCURRENCY, LENGTH = 400, 40, 96, 32, 1_024
ENGINE = EngineLoad(
    device="cpu",
    dtype="float32",
    max_length=LENGTH,
    concurrency=CONCURRENCY,
    batched_tokens=batched_tokens(LENGTH, CONCURRENCY, on_cpu=True),
    scored_tokens=PROMPT,
    cache_bytes=GIB // 2,
)


def main() -> None:
    """Prints the table to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the models are kept; default: nowhere")
    parser.add_argument("--all", action="store_true", help="also other settings of the rank")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Console(stderr=True).status("") as status:
        for name in arguments.models:
            path = (arguments.directory or Path(scratch)) / name
            save_model(path, *MODELS[name])
            shape = read_shape(str(path))
            for what, load in RANKS.items() if arguments.all else [("rank", RANK)]:
                status.update(f"{name}: {what}")
                rows.append(_rank(name, what, path, shape, load))
            status.update(f"{name}: engine")
            rows.append(_engine(name, path, shape))
    print_table("model; process; predicted (MB); measured; ratio; of which libraries; the rest", rows)


def save_model(path: Path, vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, kv: int) -> None:
    """A model with random weights and a tokenizer of words without meaning, unless it is there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if (path / "tokenizer.json").exists():
        return
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)


def _rank(name: str, what: str, path: Path, shape: ModelShape, load: RankLoad) -> list[str]:
    settings: dict[str, Any] = {
        "length": ROW,
        "trained": TRAINED,
        "rows": 2 * STEPS,
        "batch_size": 2,
        "tokens_per_microbatch": ROW,
        "zero_stage": load.zero_stage,
        "dtype": load.dtype,
        "gradient_checkpointing": load.checkpointing,
    }
    return _row(name, what, rank_memory(shape, load), measure("rank", path, settings))


def _engine(name: str, path: Path, shape: ModelShape) -> list[str]:
    settings = {
        "prompt": PROMPT,
        "answer": ANSWER,
        "requests": REQUESTS,
        "max_model_len": LENGTH,
        "max_num_seqs": CONCURRENCY,
        "kv_cache_gib": ENGINE.cache_bytes / GIB,
    }
    return _row(name, "engine", engine_needs(shape, ENGINE).memory, measure("engine", path, settings))


def _row(name: str, what: str, predicted: Memory, measured: int) -> list[str]:
    total, libraries = predicted.on("host"), predicted.of("libraries")
    parts = ", ".join(
        f"{part.name} {part.bytes / 1e6:,.0f}"
        for part in predicted.components
        if part.name != "libraries" and part.bytes >= 1e6
    )
    return [
        name,
        what,
        f"{total / 1e6:,.0f}",
        f"{measured / 1e6:,.0f}",
        f"{total / measured:.2f}",
        f"{libraries / 1e6:,.0f}",
        parts,
    ]


if __name__ == "__main__":
    main()
