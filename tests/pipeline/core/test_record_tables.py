"""Records keep everything on their way through Arrow and Parquet, and no token becomes an object on it."""

from __future__ import annotations

import gc
import io
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.record_tables import (
    EXAMPLE_SCHEMA,
    OUTLINE_SCHEMA,
    examples_from_table,
    examples_to_table,
    outlines_from_table,
    trajectories_from_table,
    trajectories_to_table,
)
from pipeline.core.records import Example, Step, StopReason, Trajectory, count_targets
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
token_ids = st.integers(0, 2**31 - 1)
float32s = st.floats(width=32)
hits = st.builds(Hit, st.builds(Passage, texts, texts, texts), st.floats(width=32, allow_nan=False))
places = st.lists(st.integers(0, 2), max_size=3).map(tuple)
steps = st.builds(Step, texts, st.lists(hits, max_size=3).map(tuple), texts, places, texts, texts)
cuts = st.lists(st.integers(0, 4), max_size=3).map(sorted)


def arrays(draw: st.DrawFn, elements: st.SearchStrategy[Any], shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape))
    return np.array(draw(st.lists(elements, min_size=size, max_size=size)), dtype=dtype).reshape(shape)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(0, 12))
    return Trajectory(
        question_id=draw(texts),
        sample=draw(st.integers(0, 100)),
        policy_version=draw(st.integers(0, 100)),
        token_ids=arrays(draw, token_ids, (length,), np.int32),
        loss_mask=arrays(draw, st.booleans(), (length,), np.bool_),
        logprobs=arrays(draw, float32s, (length,), np.float32),
        answer_start=draw(st.integers(0, length)),
        steps=tuple(draw(st.lists(steps, max_size=3))),
        answer=draw(texts),
        stop_reason=draw(st.sampled_from(StopReason)),
        detail=draw(texts),
        role=draw(texts),
        log_likelihoods=tuple(draw(st.lists(st.floats(max_value=0.0), max_size=3))),
        proposal_logprobs=arrays(draw, float32s, (length,), np.float32) if draw(st.booleans()) else None,
        answer_opening=tuple(draw(st.lists(token_ids, max_size=2))),
        turn_log_likelihoods=tuple(draw(st.lists(st.floats(max_value=0.0), max_size=3))),
    )


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """With streams of every form, or without any."""
    length = draw(st.integers(0, 8))
    mask = arrays(draw, st.booleans(), (length,), np.bool_)
    shapes = st.sampled_from([(1,), (length,), (count_targets(mask), 1), (count_targets(mask), 3)])
    streams = {
        name: arrays(draw, st.floats(), shape, np.float64)
        for name, shape in draw(st.dictionaries(texts, shapes, max_size=3)).items()
    }
    ids = arrays(draw, token_ids, (length,), np.int32)
    return Example(draw(texts), draw(texts), draw(texts), ids, mask, streams)


def through_parquet(table: Any) -> Any:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return pq.read_table(buffer)


def in_pieces(table: Any, cuts: list[int]) -> Any:
    """The same table in chunks, each a slice."""
    ends = [*cuts, len(table)]
    return pa.concat_tables(
        [table.slice(start, max(0, end - start)) for start, end in zip([0, *cuts], ends, strict=True)]
    )


def assert_same_array(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape


def assert_same_trajectory(found: Trajectory, expected: Trajectory) -> None:
    for name in ("token_ids", "loss_mask", "logprobs"):
        assert_same_array(getattr(found, name), getattr(expected, name))
    assert (found.proposal_logprobs is None) == (expected.proposal_logprobs is None)
    if expected.proposal_logprobs is not None:
        assert_same_array(found.proposal_logprobs, expected.proposal_logprobs)
    np.testing.assert_array_equal(found.log_likelihoods, expected.log_likelihoods)
    for name in (
        "question_id",
        "sample",
        "role",
        "policy_version",
        "answer_start",
        "answer_opening",
        "steps",
        "answer",
        "detail",
    ):
        assert getattr(found, name) == getattr(expected, name)
    assert found.stop_reason is expected.stop_reason


def assert_same_example(found: Example, expected: Example) -> None:
    assert (found.id, found.unit, found.role) == (expected.id, expected.unit, expected.role)
    assert_same_array(found.token_ids, expected.token_ids)
    assert_same_array(found.loss_mask, expected.loss_mask)
    assert found.streams.keys() == expected.streams.keys()
    for name, values in expected.streams.items():
        assert_same_array(found.streams[name], values)


# ------------------------------------------------------------------ there and back


@settings(max_examples=30)
@given(originals=st.lists(trajectories(), max_size=4))
def test_trajectories_come_back_as_they_were(originals: list[Trajectory]) -> None:
    copies = trajectories_from_table(through_parquet(trajectories_to_table(originals)))
    for copy, original in zip(copies, originals, strict=True):
        assert_same_trajectory(copy, original)


@settings(max_examples=50)
@given(originals=st.lists(examples(), max_size=4))
def test_examples_come_back_as_they_were(originals: list[Example]) -> None:
    copies = examples_from_table(through_parquet(examples_to_table(originals)))
    for copy, original in zip(copies, originals, strict=True):
        assert_same_example(copy, original)


@settings(max_examples=50)
@given(st.lists(examples(), min_size=4, max_size=4), st.lists(trajectories(), min_size=4, max_size=4), cuts)
def test_how_a_table_is_cut_into_slices_and_chunks_does_not_matter(
    originals: list[Example], sampled: list[Trajectory], cuts: list[int]
) -> None:
    table, turns = examples_to_table(originals), trajectories_to_table(sampled)
    for copy, original in zip(examples_from_table(in_pieces(table, cuts)), originals, strict=True):
        assert_same_example(copy, original)
    for found, expected in zip(trajectories_from_table(in_pieces(turns, cuts)), sampled, strict=True):
        assert_same_trajectory(found, expected)
    (third,) = examples_from_table(table.slice(2, 1))
    assert_same_example(third, originals[2])


def test_a_gold_answer_without_a_likelihood_comes_back_without_one() -> None:
    original = replace(trajectory_of(3), log_likelihoods=(-1.5, float("nan"), float("-inf")))
    (copy,) = trajectories_from_table(through_parquet(trajectories_to_table([original])))
    np.testing.assert_array_equal(copy.log_likelihoods, original.log_likelihoods)


# ------------------------------------------------------------------ outlines


@settings(max_examples=50)
@given(originals=st.lists(examples(), max_size=4), cuts=cuts)
def test_an_outline_says_of_an_example_what_it_says_itself(originals: list[Example], cuts: list[int]) -> None:
    table = in_pieces(examples_to_table(originals), cuts).select(OUTLINE_SCHEMA.names)
    for outline, example in zip(outlines_from_table(table), originals, strict=True):
        for name in ("id", "unit", "length", "num_targets", "shapes"):
            assert getattr(outline, name) == getattr(example, name)
        for name, shape in example.shapes.items():
            if shape == (1,):
                np.testing.assert_equal(outline.number(name), example.number(name))


@pytest.mark.parametrize("stream", ["missing", "several"])
def test_an_outline_and_its_example_refuse_what_is_not_one_number_with_the_same_words(stream: str) -> None:
    example = replace(example_of(3), streams={"several": np.zeros(3)})
    (outline,) = outlines_from_table(examples_to_table([example]))
    messages = []
    for one in (outline, example):
        with pytest.raises(ValueError, match="example q must have one number as") as caught:
            one.number(stream)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_stream_that_fits_nothing_is_refused_without_the_tokens() -> None:
    table = examples_to_table([replace(example_of(4), streams={"x": np.zeros(4)})])
    shorter = table.set_column(4, "loss_mask", pa.array([[True, True, True]], pa.list_(pa.bool_())))
    with pytest.raises(ValueError, match=r"example q: stream x has the shape \[4\]"):
        outlines_from_table(shorter.select(OUTLINE_SCHEMA.names))


# ------------------------------------------------------------------ tables that others wrote


def test_a_table_of_something_else_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="the columns id, unit, streams are missing"):
        examples_from_table(pa.table({"role": [], "token_ids": [], "loss_mask": []}))
    with pytest.raises(
        ValueError, match=r"the columns .* log_likelihoods, proposal_logprobs, answer_opening are missing"
    ):
        trajectories_from_table(pa.table({"question_id": []}))


def test_trajectories_that_an_earlier_version_wrote_have_no_values_of_turns() -> None:
    made = replace(trajectory_of(3), turn_log_likelihoods=(-1.0, -2.0))
    older = trajectories_to_table([made, made]).drop_columns(["turn_log_likelihoods"])
    read = trajectories_from_table(older)
    assert [one.turn_log_likelihoods for one in read] == [(), ()]
    assert [one.token_ids.tolist() for one in read] == [made.token_ids.tolist()] * 2


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("token_ids", pa.array(["one two"])),
        ("token_ids", pa.array([[2**40]])),
        ("streams", pa.array([1.0])),
    ],
    ids=["strings", "numbers that do not fit", "no map"],
)
def test_a_column_of_another_type_is_refused(column: str, values: Any) -> None:
    table = examples_to_table([example_of(1)])
    with pytest.raises(ValueError, match=r"a column has another type .* make it again"):
        examples_from_table(table.set_column(table.column_names.index(column), column, values))


def test_lists_of_wider_types_are_taken_as_well() -> None:
    original = example_of(5)
    wide = pa.schema(
        [
            ("id", pa.large_string()),
            ("token_ids", pa.large_list(pa.int64())),
            *(EXAMPLE_SCHEMA.field(name) for name in ("unit", "role", "loss_mask", "streams")),
        ]
    )
    (copy,) = examples_from_table(examples_to_table([original]).select(wide.names).cast(wide))
    assert_same_example(copy, original)


@pytest.mark.parametrize("tokens", [[1, None, 3], None])
def test_a_token_that_is_not_there_is_refused(tokens: Any) -> None:
    table = examples_to_table([example_of(3)])
    with pytest.raises(ValueError, match=r"1 (elements of )?lists of type list<item: int32> are null"):
        examples_from_table(table.set_column(3, "token_ids", pa.array([tokens], pa.list_(pa.int32()))))


@pytest.mark.parametrize("wrong", [0, 2])
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("loss_mask", [True] * 3, "example q: 4 ids and 3 mask flags"),
        ("streams", [("x", {"values": [1.0, 2.0], "width": 0})], r"example q: stream x has the shape \[2\]"),
        (
            "streams",
            [("x", {"values": [1.0] * 4, "width": 2})],
            r"example q: stream x has the shape \[2, 2\]",
        ),
        ("streams", [("x", {"values": [1.0] * 4, "width": 3})], "cannot reshape"),
        ("streams", [("x", {"values": [1.0], "width": None})], "1 elements of type int32 are null"),
        ("unit", None, "1 values of the column unit are null: .* make it again"),
    ],
)
def test_one_row_that_contradicts_itself_is_found_among_others(
    wrong: int, column: str, values: Any, message: str
) -> None:
    table = examples_to_table([example_of(4)] * 3)
    with pytest.raises(ValueError, match=message):
        examples_from_table(with_value(table, column, wrong, values))


@pytest.mark.parametrize("wrong", [0, 2])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("loss_mask", [True] * 3, "trajectory q/0: arrays of different lengths"),
        ("logprobs", [0.0] * 5, "trajectory q/0: arrays of different lengths"),
        ("logprobs", None, "1 lists of type list<item: float> are null"),
        ("answer_start", 5, "trajectory q/0: answer_start 5"),
        ("answer_start", -1, "trajectory q/0: answer_start -1"),
        ("answer_start", None, "1 values of the column answer_start are null"),
        ("stop_reason", "tired", "'tired' is not a valid StopReason"),
        ("stop_reason", None, "1 values of the column stop_reason are null"),
        ("answer_opening", [None], "1 elements of lists of type list<item: int32> are null"),
        ("steps", None, "null among the steps"),
        ("steps", [None], "null among the steps"),
        ("steps", [{"query": "a", "hits": None, "record": ""}], "null among the steps"),
        ("steps", [{"query": "a", "hits": [{"id": "p"}], "record": ""}], "null among the steps"),
    ],
)
def test_one_turn_that_contradicts_itself_is_found_among_others(
    wrong: int, column: str, value: Any, message: str
) -> None:
    table = trajectories_to_table([trajectory_of(4)] * 3)
    with pytest.raises(ValueError, match=message):
        trajectories_from_table(with_value(table, column, wrong, value))


def with_value(table: Any, column: str, row: int, value: Any) -> Any:
    values = table[column].to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


def test_a_number_that_is_not_there_is_none() -> None:
    table = trajectories_to_table([trajectory_of(3)])
    holey = table.set_column(5, "logprobs", pa.array([[-1.0, None, -2.0]], pa.list_(pa.float32())))
    np.testing.assert_array_equal(trajectories_from_table(holey)[0].logprobs, [-1.0, np.nan, -2.0])


# ------------------------------------------------------------------ memory

ROWS, LENGTH = 50, 4_000


def example_of(length: int) -> Example:
    mask = np.ones(length, dtype=np.bool_)
    streams = {"log_weight": np.zeros(1), "advantage": np.zeros(length)}
    return Example("q", "q", "policy", np.arange(length, dtype=np.int32), mask, streams)


def trajectory_of(length: int) -> Trajectory:
    ids, floats = np.arange(length, dtype=np.int32), np.zeros(length, dtype=np.float32)
    return Trajectory(
        "q",
        0,
        0,
        ids,
        np.ones(length, np.bool_),
        floats,
        length,
        (),
        "",
        StopReason.ANSWERED,
        "",
        "a",
        (),
        floats,
    )


@pytest.mark.parametrize(
    ("read", "write", "record"),
    [
        (examples_from_table, examples_to_table, example_of(LENGTH)),
        (outlines_from_table, examples_to_table, example_of(LENGTH)),
        (trajectories_from_table, trajectories_to_table, trajectory_of(LENGTH)),
    ],
    ids=["examples", "outlines", "trajectories"],
)
def test_no_token_becomes_an_object(read: Callable[..., Any], write: Callable[..., Any], record: Any) -> None:
    # Arrow's own memory is not seen here. A list of integers takes 36 bytes for each.
    table = write([record] * ROWS)
    assert peak_of(lambda: read(table)) < 2 * ROWS * LENGTH
    # Writing joins the arrays of each column: of an example here 13 bytes a token.
    assert peak_of(lambda: write([record] * ROWS)) < 16 * ROWS * LENGTH


def peak_of(work: Callable[[], Any]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
