"""The plan's memory against real processes on CPUs.

    python -m bench.plan [--directory DIR] [--all] [0.1M] [3M] [60M] [170M] [250M]
    python -m bench.plan --allocators [MODEL ...]
    python -m bench.plan --asleep [MODEL ...]

Qwen2-architecture models with random weights. A learner rank trains a few steps on full rows, an engine serves and
scores more requests than it takes at once; both as in a run's actors, one after the other. Prints a Markdown table:
most anonymous memory (`bench.memory`), predicted and measured, and of what the prediction is made. `--allocators`: what
the rank holds with glibc in place of our allocator on CPUs, and what the processor time of each is, start included.
`--asleep`: what an engine keeps while it sleeps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from actors.engine_options import batched_tokens
from actors.session import cpu_environment
from bench.measure import print_table
from bench.peaks import Measured, asleep, measure
from pipeline.core.plan.engine import EngineLoad, engine_needs
from pipeline.core.plan.learner import RankLoad, rank_memory
from pipeline.core.plan.memory import GIB, Memory
from pipeline.core.plan.needs import ASLEEP
from pipeline.core.plan.shape import read_shape

if TYPE_CHECKING:
    from transformers import Qwen2Config

MODELS = {
    "0.1M": (512, 64, 192, 2, 2, 1),
    "3M": (512, 256, 768, 4, 4, 2),
    "60M": (32_000, 512, 2_816, 8, 8, 4),
    "170M": (262_144, 640, 2_048, 1, 4, 1),
    "250M": (64_000, 1_024, 4_096, 12, 16, 4),
}
"""Vocabulary, hidden size, feed-forward size, layers, heads, KV heads. 170M: nearly all of it the embedding."""
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
    "rank, bfloat16": replace(RANK, dtype="bfloat16"),
    "rank, bfloat16, ZeRO-2": replace(RANK, dtype="bfloat16", zero_stage=2),
}
GLIBC = {"LD_PRELOAD": "", "MALLOC_CONF": ""}
KEEP_ALL = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
ALLOCATORS = {"jemalloc": {}, "glibc": GLIBC, "glibc that keeps all": GLIBC | KEEP_ALL}
"""What is added to the environment of an actor."""
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
ENGINE_SETTINGS = {
    "prompt": PROMPT,
    "answer": ANSWER,
    "requests": REQUESTS,
    "max_model_len": LENGTH,
    "max_num_seqs": CONCURRENCY,
    "kv_cache_gib": ENGINE.cache_bytes / GIB,
}


def main() -> None:
    """Prints the table to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the models are kept; default: nowhere")
    parser.add_argument("--all", action="store_true", help="also other settings of the rank")
    parser.add_argument("--allocators", action="store_true", help="the rank with several allocators")
    parser.add_argument("--asleep", action="store_true", help="the engine awake and asleep")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            path = (arguments.directory or Path(scratch)) / name
            _save_model(path, model_config(name))
            if arguments.allocators:
                rows += _allocators(name, path)
            elif arguments.asleep:
                rows += _asleep(name, path)
            else:
                rows += _plan(name, path, arguments.all)
    header = "model; process; predicted (MB); measured; ratio; of which libraries; the rest"
    if arguments.allocators:
        header = "model; allocator; peak of the rank (MB); processor time (s)"
    if arguments.asleep:
        header = "model; engine awake (MB); asleep; predicted asleep"
    print_table(header, rows)


def model_config(name: str) -> Qwen2Config:
    """Of one of `MODELS`."""
    from transformers import Qwen2Config

    vocabulary, hidden, mlp, layers, heads, kv_heads = MODELS[name]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )


def _save_model(path: Path, config: Qwen2Config) -> None:
    """A model with random weights and a tokenizer of words without meaning, unless it is there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    if (path / "tokenizer.json").exists():
        return
    Qwen2ForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)


def _allocators(name: str, path: Path) -> list[list[str]]:
    rows = []
    for allocator, environment in ALLOCATORS.items():
        measured = _measure(f"{name}: {allocator}", "rank", path, _rank_settings(RANK), environment)
        rows.append([name, allocator, f"{measured.bytes / 1e6:,.0f}", f"{measured.cpu_s:.1f}"])
    return rows


def _asleep(name: str, path: Path) -> list[list[str]]:
    predicted = engine_needs(read_shape(str(path)), ENGINE).memory.only(*ASLEEP).on("host")
    with Console(stderr=True).status(f"{name}: engine"):
        held = asleep(path, dict(ENGINE_SETTINGS), cpu_environment())
    return [[name, *(f"{size / 1e6:,.0f}" for size in (held["awake"], held["asleep"], predicted))]]


def _plan(name: str, path: Path, every_rank: bool) -> list[list[str]]:
    shape = read_shape(str(path))
    ranks = RANKS if every_rank else {"rank": RANK}
    return [
        *(
            _row(name, what, rank_memory(shape, load), "rank", path, _rank_settings(load))
            for what, load in ranks.items()
        ),
        _row(name, "engine", engine_needs(shape, ENGINE).memory, "engine", path, ENGINE_SETTINGS),
    ]


def _rank_settings(load: RankLoad) -> dict[str, Any]:
    return {
        "length": ROW,
        "trained": TRAINED,
        "rows": 2 * STEPS,
        "batch_size": 2,
        "tokens_per_microbatch": ROW,
        "zero_stage": load.zero_stage,
        "dtype": load.dtype,
        "gradient_checkpointing": load.checkpointing,
    }


def _row(
    name: str, what: str, predicted: Memory, process: str, model: Path, settings: dict[str, Any]
) -> list[str]:
    measured = _measure(f"{name}: {what}", process, model, settings).bytes
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


def _measure(
    status: str,
    process: str,
    model: Path,
    settings: dict[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """With that beside the environment of an actor on CPUs."""
    with Console(stderr=True).status(status):
        return measure(process, model, settings, cpu_environment() | dict(environment or {}))


if __name__ == "__main__":
    main()
