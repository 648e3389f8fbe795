"""Of a shard of training examples only what is asked for is read and kept."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UserError
from pipeline.core.example_files import read_examples, read_outlines, read_outlines_and_overlaps
from pipeline.core.prefixes import overlaps_of
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example

ROWS, LENGTH = 100, 2_000


def make(number: int) -> Example:
    random = np.random.default_rng(number)
    ids = random.integers(0, 100_000, LENGTH).astype(np.int32)
    return Example(
        f"q{number}", f"q{number}", "policy", ids, random.random(LENGTH) < 0.5, {"log_weight": np.zeros(1)}
    )


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "000000.parquet"
    pq.write_table(examples_to_table([make(number) for number in range(ROWS)]), path)
    return path


def test_outlines_are_read_without_the_tokens(shard: Path) -> None:
    tokens = pq.read_metadata(shard).row_group(0).column(3)
    assert tokens.path_in_schema.startswith("token_ids")
    with open(shard, "r+b") as file:
        file.seek(tokens.dictionary_page_offset or tokens.data_page_offset)
        file.write(bytes(tokens.total_compressed_size))
    outlines = read_outlines(shard)
    assert [outline.num_targets for outline in outlines] == [
        make(number).num_targets for number in range(ROWS)
    ]
    with pytest.raises((OSError, UserError)):
        read_examples(shard)


def test_outlines_and_overlaps_come_together(tmp_path: Path) -> None:
    examples = [replace(make(number % 7), id=f"q{number}", unit=f"q{number // 4}") for number in range(ROWS)]
    shard = tmp_path / "000000.parquet"
    pq.write_table(examples_to_table(examples), shard)
    outlines, overlaps = read_outlines_and_overlaps(shard)
    assert outlines == read_outlines(shard)
    assert overlaps == overlaps_of([it.unit for it in examples], [it.token_ids for it in examples])


def test_roles_of_a_unit_overlap_only_where_they_may_share_a_row(tmp_path: Path) -> None:
    """What overlaps is sorted as it is packed: all of a unit together, or of a joint loss each role by itself."""
    ids = ([1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6])
    roles = ("asker", "answerer", "asker", "answerer")
    examples = [
        replace(make(k), unit="q", role=role, token_ids=np.array(own, np.int32), loss_mask=np.ones(3, bool), streams={})
        for k, (own, role) in enumerate(zip(ids, roles, strict=True))
    ]  # fmt: skip
    shard = tmp_path / "000000.parquet"
    pq.write_table(examples_to_table(examples), shard)
    _, together = read_outlines_and_overlaps(shard)
    assert [(own.rank, own.shared) for own in together] == [(0, 0), (1, 2), (2, 2), (3, 2)]
    _, apart = read_outlines_and_overlaps(shard, by_role=True)
    assert sorted((role, own.shared) for role, own in zip(roles, apart, strict=True)) == [
        ("answerer", 0),
        ("answerer", 2),
        ("asker", 0),
        ("asker", 2),
    ]


def test_chosen_examples_come_in_full_and_hold_no_others(shard: Path) -> None:
    gc.collect()
    before, rows = pa.total_allocated_bytes(), np.array([3, 40, 41, 99])
    chosen = read_examples(shard, rows)
    held = pa.total_allocated_bytes() - before
    for example, number in zip(chosen, rows.tolist(), strict=True):
        assert example.id == f"q{number}"
        np.testing.assert_array_equal(example.token_ids, make(number).token_ids)
        np.testing.assert_array_equal(example.loss_mask, make(number).loss_mask)
    assert held < 2 * len(rows) * LENGTH * 4
    assert [example.id for example in read_examples(shard)] == [f"q{number}" for number in range(ROWS)]


def most_memory_of_reading(shard: Path) -> int:
    """Of Arrow, since this process began."""
    outlines, chosen = read_outlines(shard), read_examples(shard, np.arange(0, 2048, 128))
    assert (len(outlines), len(chosen)) == (2048, 16)
    return int(pa.default_memory_pool().max_memory())


def test_a_large_shard_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    shard, table = tmp_path / "large.parquet", examples_to_table([make(number) for number in range(64)])
    pq.write_table(pa.concat_tables([table] * 32), shard)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert processes.submit(most_memory_of_reading, shard).result() < 32 * table.nbytes / 2


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    other, text = tmp_path / "other.parquet", tmp_path / "text.parquet"
    pq.write_table(pa.table({"id": ["q"], "unit": ["q"], "loss_mask": [[True]]}), other)
    text.write_text("token_ids")
    for read in (read_outlines, read_outlines_and_overlaps, read_examples):
        with pytest.raises(
            UserError, match=r"other\.parquet holds no training examples: the columns role, token_ids"
        ):
            read(other)
        with pytest.raises(UserError, match=r"text\.parquet holds no training examples: .*Parquet"):
            read(text)
