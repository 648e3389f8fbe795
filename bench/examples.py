"""One rank of the learner, from shards of examples to packed rows, against the way by Python lists.

    python -m bench.examples [--tokens 1000000]

Both sides do all that an M-step does but for the model: they read, check, plan, take the fingerprint, and lay out one
epoch of packed rows. Peak memory is that of Arrow's pool and that of Python and NumPy (tracemalloc), added, above what
is there before: no less than what is held at once. It is measured in processes of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from actors.learner_examples import PhaseExamples
from bench.measure import Brevity, Ratio, in_turn, print_table
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.packing import collate, plan_epoch
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example
from pipeline.core.training_phase import phase_key

TOKENS, LONGEST, VOCABULARY = 1_000_000, 2_000, 150_000
EXAMPLES_PER_SHARD = 256
GOAL = 1.5


def run() -> list[Ratio]:
    """One rank with all examples."""
    with tempfile.TemporaryDirectory() as directory, _one_rank():
        tokens = write_shards(Path(directory), TOKENS)
        ours, lists = _rates(Path(directory), tokens, ranks=1)
    return [Ratio("examples to packed rows", "Python lists", "tokens", ours, lists, GOAL)]


def by_outline(shards: Sequence[Path], ranks: int) -> None:
    """As the learner does it."""
    _epoch(PhaseExamples(shards, WeightedNll(), "lm", share_prefixes=True), ranks)


def by_lists(shards: Sequence[Path], ranks: int) -> None:
    """Every rank makes Python objects of all tokens, and keeps all examples."""
    examples = [_example(**row) for shard in shards for row in pq.read_table(shard).to_pylist()]
    _epoch(PhaseExamples(examples, WeightedNll(), "lm", share_prefixes=True), ranks)


def _example(id, unit, role, token_ids, loss_mask, streams) -> Example:  # type: ignore[no-untyped-def]
    numbers = {name: np.asarray(stored["values"], dtype=np.float64) for name, stored in streams}
    return Example(id, unit, role, np.asarray(token_ids, np.int32), np.asarray(loss_mask, np.bool_), numbers)


def _epoch(examples: PhaseExamples, ranks: int) -> None:
    """What the first of so many ranks does."""
    loss, config, outlines = WeightedNll(), LearnerConfig(), examples.outlines
    prepared = loss.prepare(outlines)
    plan = plan_epoch(
        [outline.length for outline in outlines],
        batch_size=config.batch_size,
        world_size=ranks,
        token_budget=config.tokens_per_microbatch,
        seed=(0, 0),
        units=[outline.unit for outline in outlines],
        may_cut=() if loss.compares else (0,),
        overlaps=examples.overlaps,
    )
    phase_key(examples.digests, loss)
    packs = [pack for step in plan for pack in step.packs[0]]
    own = examples.load(k for pack in packs for k in pack)
    for pack in packs:
        collate(pack, own, loss.streams, prepared.streams, share_prefixes=True)


WAYS: dict[str, Callable[[Sequence[Path], int], None]] = {"outline": by_outline, "lists": by_lists}


def write_shards(directory: Path, tokens: int) -> int:
    """Examples of 1,000 to 2,000 tokens with one weight each, so many tokens or a few more in all; returns how many."""
    random = np.random.default_rng(0)
    examples: list[Example] = []
    while sum(example.length for example in examples) < tokens:
        length = int(random.integers(LONGEST // 2, LONGEST + 1))
        name, ids = f"q{len(examples)}/0", random.integers(0, VOCABULARY, length).astype(np.int32)
        mask, weight = np.arange(length) % 300 >= 200, np.log([random.uniform(0.5, 1.0)])
        examples.append(Example(name, name, "searcher", ids, mask, {"log_weight": weight}))
    for start in range(0, len(examples), EXAMPLES_PER_SHARD):
        table = examples_to_table(examples[start : start + EXAMPLES_PER_SHARD])
        pq.write_table(table, directory / f"{start:06d}.parquet")
    return sum(example.length for example in examples)


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet"))


def _rates(directory: Path, tokens: int, ranks: int) -> tuple[list[float], list[float]]:
    def rate(way: Callable[[Sequence[Path], int], None]) -> float:
        start = time.perf_counter()
        way(_shards(directory), ranks)
        return tokens / (time.perf_counter() - start)

    return in_turn(lambda: rate(by_outline), lambda: rate(by_lists))


@contextmanager
def _one_rank() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _peak(way: str, directory: Path, ranks: int) -> int:
    """In a process of its own."""
    command = [sys.executable, "-m", "bench.examples", "--peak", way, str(directory), str(ranks)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _peak_here(way: str, directory: Path, ranks: int) -> int:
    with tempfile.TemporaryDirectory() as small:
        write_shards(Path(small), 1)
        WAYS[way](_shards(Path(small)), ranks)  # imports what it needs
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    WAYS[way](_shards(directory), ranks)
    return int(pa.default_memory_pool().max_memory() - before + tracemalloc.get_traced_memory()[1])


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--peak", nargs=3, metavar=("WAY", "DIRECTORY", "RANKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with _one_rank():
        if arguments.peak:
            way, directory, ranks = arguments.peak
            print(_peak_here(way, Path(directory), int(ranks)))
            return
        with tempfile.TemporaryDirectory() as scratch:
            _compare(Path(scratch), arguments.tokens)


def _compare(directory: Path, tokens: int) -> None:
    tokens = write_shards(directory, tokens)
    size = sum(pq.read_table(shard).nbytes for shard in _shards(directory))
    print(f"{tokens:,} tokens, {size / 1e6:.1f} MB in Arrow, {len(_shards(directory))} shards\n")
    rows = []
    for ranks in (1, 8):
        for way, rates in zip(WAYS, _rates(directory, tokens, ranks), strict=True):
            seconds = sorted(tokens / rate for rate in rates)
            peaks = [_peak(way, directory, ranks) for _ in range(Brevity.runs())]
            rows.append(
                (
                    way,
                    str(ranks),
                    f"{statistics.median(seconds):.3f}",
                    f"{seconds[0]:.3f} to {seconds[-1]:.3f}",
                    f"{statistics.median(peaks) / 1e6:.1f}",
                    f"{min(peaks) / 1e6:.1f} to {max(peaks) / 1e6:.1f}",
                    f"{statistics.median(peaks) / size:.1f}",
                )
            )
    print_table("way; ranks; seconds; min, max; peak (MB); min, max; of Arrow's size", rows)


if __name__ == "__main__":
    main()
