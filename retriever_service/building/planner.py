"""What an index will cost in memory, disk and time, before anything is started.

Guarantees:
- the sizes of a plan depend on what was asked for alone, so that a build that was cut off is planned alike when it
  goes on;
- a build whose plan passes `check_fits` has room in memory and on its disk; one whose plan does not is refused with
  the nearest bound or factory string that would;
- sizes are those of `index_size`, times are extrapolated from a `Calibration` of this machine.
"""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from retriever_service.building.calibration import Calibration, Seconds
from retriever_service.building.tuning import LARGEST_BLOCK, NUM_QUERIES
from retriever_service.choices import StoreDtype
from retriever_service.errors import RetrieverError
from retriever_service.index.filling import SLICE_ROWS
from retriever_service.index.index_size import IndexSize, index_size
from retriever_service.index.store import FLAT
from retriever_service.machine import available_memory

TRAINING_ROWS_PER_CENTROID = 64
LEAST_TRAINING_ROWS_PER_CENTROID = 39
"""With fewer FAISS warns that its k-means is poor."""
MOST_SEGMENTS = 64
"""A query searches them one after the other."""
PASSAGE_BYTES = 700
"""On disk: 100 English words with title and id."""
_PROCESS_BYTES = 200 << 20
"""Interpreter, NumPy, FAISS and Arrow."""
_BYTES_PER_SCORE = 12
"""Of `tuning.exact_neighbours`."""
_CODEC_TRAINING_ROWS = 100_000
"""FAISS learns codes from at most so many rows, which it copies."""
_FLOAT = 4
_STORED_FLOAT = {"float32": 4, "float16": 2}
_WORDS_ONCE_BYTES = 64 << 20
"""Of building a word index: numba and SciPy, and the commonest words."""
_WORDS_PER_PASSAGE, _WORDS_PER_BYTE = 48, 3.0
"""Memory for every passage, and for every byte of its text. Measured on English text: 2.2 to 2.6 for a byte."""
_WORDS_DISK_PER_BYTE = 0.9
"""Of the word index, for every byte of text. Measured: 0.6 to 0.9, less the larger the corpus is."""
_GPU_SCRATCH_BYTES = 1536 << 20
"""What FAISS takes on each GPU for intermediate results."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be built."""

    count: int
    """Passages."""
    dimension: int
    factory: str
    memory_bytes: int | None
    """Bound on the memory of the building process; None for a single segment, whatever it takes."""
    store_dtype: StoreDtype
    """Of the encoded passages on disk."""
    passage_bytes: float
    """Disk per passage, of its text; on average."""
    has_vectors: bool
    """The passages are encoded already."""
    bm25: bool = False
    """A word index too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted sizes in bytes, and how a build keeps to its memory bound."""

    request: Request
    segments: tuple[int, ...]
    """Rows of each."""
    training_rows: int
    """Size of the sample that the index is trained on; 0 where nothing is trained."""
    bytes_per_vector: float
    """In the index, without what comes once per segment."""
    index_bytes: int
    vectors_bytes: int
    """Encoded passages, as the build reads them."""
    passages_bytes: int
    words_bytes: int
    """Of the word index; 0 without one."""
    words_memory_bytes: int
    """Peak resident memory while the word index is built, which cannot be done in parts; 0 without one."""
    disk_bytes: int
    """Most that the build puts on the disk."""
    build_memory_bytes: int
    """Peak resident memory of the building process."""
    least_memory_bytes: int
    """The smallest bound that such an index can be built within."""
    load_private_bytes: int
    """Memory of each process that has the index open, memory-mapped; its encoder comes on top."""
    load_mapped_bytes: int
    """Pages of the index files, shared by all processes of a machine."""
    vram_bytes: int | None
    """Memory on one GPU that holds all of it, in float16; None where FAISS cannot search it on a GPU."""
    seconds: Seconds | None
    """None without a calibration."""


def plan_index(
    count: int,
    dimension: int,
    factory: str,
    *,
    memory_bytes: int | None = None,
    store_dtype: StoreDtype = "float32",
    passage_bytes: float = PASSAGE_BYTES,
    has_vectors: bool = False,
    bm25: bool = False,
    calibration: Calibration | None = None,
) -> Plan:
    """Predict sizes and times; see `Request` for the arguments, `calibration.calibrate` for times.

    A bound that is too small for the index gives the plan that comes closest; `check_fits` refuses it.

    Raises:
        RetrieverError: a factory string that is none, does not fit the dimension or needs more passages; a
            number below 1.
    """
    if min(count, dimension) < 1 or (memory_bytes is not None and memory_bytes < 1):
        raise RetrieverError(
            f"{count} vectors of {dimension} dimensions within {memory_bytes} bytes cannot be planned; all three "
            "must be at least 1"
        )
    request = Request(count, dimension, factory, memory_bytes, store_dtype, passage_bytes, has_vectors, bm25)
    return _plan(request, calibration)


def check_fits(plan: Plan, out_dir: str | Path, memory_bytes: int | None = None) -> None:
    """Refuse a build that would run out of memory or disk.

    Args:
        out_dir: where the index will be; need not exist.
        memory_bytes: that may be used; None for what the machine has free.

    Raises:
        RetrieverError: what is needed, what there is, and the nearest bound or factory string that would fit.
    """
    request = plan.request
    have = available_memory() if memory_bytes is None else memory_bytes
    if plan.build_memory_bytes > have:
        within = replace(request, memory_bytes=have)
        if plan.words_memory_bytes > have:
            advice = (
                "so much takes the word index alone, which is built in one piece; build without it (--bm25)"
            )
        elif plan.least_memory_bytes <= have:
            bounded = _plan(within)
            advice = f"with a memory bound of {have:,} bytes it is built in {len(bounded.segments)} segments"
        else:
            advice = f"the smallest bound that works is {plan.least_memory_bytes:,} bytes" + _nearest(
                within, lambda other: other.build_memory_bytes <= have
            )
        raise _too_large(plan, out_dir, "memory", plan.build_memory_bytes, have, advice)
    directory = Path(out_dir).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes > free:
        advice = "make room" + _nearest(request, lambda other: other.disk_bytes <= free)
        raise _too_large(plan, out_dir, "disk space", plan.disk_bytes, free, advice)


def check_loads(plan: Plan, gpu_free_bytes: Sequence[int]) -> None:
    """Refuse to search on GPUs that the index does not fit on, divided equally.

    Args:
        gpu_free_bytes: memory that is free on each GPU.

    Raises:
        RetrieverError: what is needed, what there is, and the nearest factory string that would fit.
    """
    request, have = plan.request, min(gpu_free_bytes)
    need = _vram(index_size(request.factory, request.dimension), request.count, len(gpu_free_bytes))
    if need is not None and need <= have:
        return

    def fits(other: Plan) -> bool:
        size = index_size(other.request.factory, request.dimension)
        return (_vram(size, request.count, len(gpu_free_bytes)) or math.inf) <= have

    advice = "search it on the CPU" + _nearest(request, fits)
    if need is None:
        raise RetrieverError(f"FAISS cannot search a {request.factory!r} index on a GPU: {advice}")
    raise _too_large(plan, f"{len(gpu_free_bytes)} GPUs", "memory on each", need, have, advice)


def _plan(request: Request, calibration: Calibration | None = None) -> Plan:
    size = index_size(request.factory, request.dimension)
    count = request.count
    if size.least_training_rows > count:
        raise RetrieverError(
            f"index factory {request.factory!r} needs at least {size.least_training_rows:,} passages, the corpus has "
            f"{count:,}"
        )
    training = _training_rows(size, request)
    segments = _segments(size, request)
    words_memory = _words_memory(request)
    build = max(
        words_memory,
        _training_memory(size, request, training),
        _segment_memory(size, request, max(segments)),
    )
    least = max(
        words_memory,
        _training_memory(size, request, _training_rows(size, replace(request, memory_bytes=1))),
        _segment_memory(size, request, math.ceil(count / MOST_SEGMENTS)),
    )
    index_bytes = sum(size.file(rows) for rows in segments)
    passages = round(count * request.passage_bytes)
    words = round(passages * _WORDS_DISK_PER_BYTE) if request.bm25 else 0
    vectors = count * request.dimension * _STORED_FLOAT[request.store_dtype]
    return Plan(
        request=request,
        segments=segments,
        training_rows=training,
        bytes_per_vector=size.per_vector,
        index_bytes=index_bytes,
        vectors_bytes=vectors,
        passages_bytes=passages,
        words_bytes=words,
        words_memory_bytes=words_memory,
        # The encoded passages come with a copy of the passages.
        disk_bytes=index_bytes
        + size.once
        + passages
        + words
        + (0 if request.has_vectors else vectors + passages),
        build_memory_bytes=build,
        least_memory_bytes=least,
        load_private_bytes=_PROCESS_BYTES + sum(size.private(rows) for rows in segments),
        load_mapped_bytes=index_bytes,
        vram_bytes=_vram(size, count, 1),
        seconds=None
        if calibration is None
        else calibration.seconds(
            0 if request.has_vectors else count, segments, training, index_bytes + passages
        ),
    )


def _training_rows(size: IndexSize, request: Request) -> int:
    """So many as the bound allows, between what FAISS asks for and what is worth while."""
    if not size.least_training_rows:
        return 0
    centroids = max(1_024, size.num_lists)
    rows = min(request.count, TRAINING_ROWS_PER_CENTROID * centroids)
    if request.memory_bytes is None:
        return rows
    least = min(LEAST_TRAINING_ROWS_PER_CENTROID * max(256, size.num_lists), request.count)
    fitting = bisect_right(
        range(rows + 1), request.memory_bytes, key=lambda n: _training_memory(size, request, n)
    )
    return max(fitting - 1, least)


def _training_memory(size: IndexSize, request: Request, rows: int) -> int:
    """The sample, what transforms make of it, what the codec learns from, and a few copies of what is learnt."""
    copies = rows * (request.dimension + size.inner_dimension)
    learnt = 2 * min(rows, _CODEC_TRAINING_ROWS) * size.inner_dimension
    return _PROCESS_BYTES + 4 * size.once + _FLOAT * (copies + learnt)


def _segment_memory(size: IndexSize, request: Request, rows: int) -> int:
    """While it is filled, from a slice of vectors in its different forms; then mapped and read, to measure it."""
    slices = SLICE_ROWS * _FLOAT * (request.dimension + 2 * size.inner_dimension)
    filling = slices + size.once + size.building(rows)
    sampled = _BYTES_PER_SCORE * min(NUM_QUERIES, request.count) * min(LARGEST_BLOCK, request.count)
    measuring = 0 if request.factory == FLAT else max(sampled, size.file(rows))
    return _PROCESS_BYTES + max(filling, measuring)


def _words_memory(request: Request) -> int:
    """Numbers of words, then their scores, of the whole corpus."""
    if not request.bm25:
        return 0
    each = _WORDS_PER_PASSAGE + _WORDS_PER_BYTE * request.passage_bytes
    return _PROCESS_BYTES + _WORDS_ONCE_BYTES + round(request.count * each)


def _segments(size: IndexSize, request: Request) -> tuple[int, ...]:
    """As few as the bound allows, of equal length."""
    numbers = range(1, min(MOST_SEGMENTS, request.count) + 1)
    if request.memory_bytes is None:
        number = 1
    else:
        bound = request.memory_bytes
        fitting = (
            n for n in numbers if _segment_memory(size, request, math.ceil(request.count / n)) <= bound
        )
        number = next(fitting, numbers[-1])
    ends = [request.count * i // number for i in range(number + 1)]
    return tuple(end - start for start, end in pairwise(ends))


def _vram(size: IndexSize, count: int, gpus: int) -> int | None:
    """On each of so many GPUs."""
    if size.gpu_per_vector is None:
        return None
    return round(size.gpu_per_vector * count / gpus) + size.gpu_once + _GPU_SCRATCH_BYTES


def _nearest(request: Request, fits: Callable[[Plan], bool]) -> str:
    """Words that name the largest smaller index that fits, if there is one."""
    for smaller in _smaller(request):
        if fits(_plan(smaller)):
            halves = ", and vectors stored in float16" if smaller.store_dtype != request.store_dtype else ""
            return f"; {smaller.factory!r}{halves} would fit"
    return ""


def _smaller(request: Request) -> Iterator[Request]:
    """The same kind of index with smaller codes, the largest first; a graph may be left out too."""
    size = index_size(request.factory, request.dimension)
    head, _, codec = request.factory.rpartition(",")
    if codec.startswith("HNSW"):
        head = request.factory
    heads = {f"{head}," if head else "", ""} if size.is_graph else {f"{head}," if head else ""}
    codecs = ["Flat", "SQfp16", "SQ8", *(f"PQ{size.inner_dimension // n}" for n in (2, 4, 8, 16))]
    found = []
    for factory in (head + codec for head in heads for codec in codecs):
        try:
            smaller = index_size(factory, request.dimension)
        except RetrieverError:  # not every number of dimensions can be divided
            continue
        if smaller.per_vector < size.per_vector and smaller.least_training_rows <= request.count:
            found.append((smaller.per_vector, factory))
    factories = [factory for _, factory in sorted(found, reverse=True)]
    yield from (replace(request, factory=factory) for factory in factories)
    if request.store_dtype == "float32" and not request.has_vectors:
        yield from (
            replace(request, factory=factory, store_dtype="float16")
            for factory in (request.factory, *factories)
        )


def _too_large(plan: Plan, where: object, what: str, need: int, have: int, advice: str) -> RetrieverError:
    request = plan.request
    return RetrieverError(
        f"{where}: {request.factory!r} over {request.count:,} vectors of {request.dimension} dimensions needs "
        f"{need / 1e9:,.1f} GB of {what}, there are {have / 1e9:,.1f} GB: {advice}"
    )
