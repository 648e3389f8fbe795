"""Reading a directory of vectors, and what is refused of one; a hashing encoder in place of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec, Vectors
from retriever_service.encoding.vectors import VectorStore
from retriever_service.errors import RetrieverError
from tests.retriever_service.support import DIMENSION, HashEncoder, load_hash_encoder, write_jsonl

COUNT, SHARD_ROWS = 150, 40
SPEC = EncoderSpec("hash")


def encode(directory: Path, **options: Any) -> VectorStore:
    corpus = write_jsonl(
        directory / "c.jsonl",
        ({"id": f"p{i}", "title": "", "text": f"word{i} of {i % 7}"} for i in range(COUNT)),
    )
    options = {"workers": 1, "shard_rows": SHARD_ROWS, "load_encoder": load_hash_encoder} | options
    return encode_corpus([corpus], directory / "vectors", SPEC, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VectorStore:
    return encode(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def expected(store: VectorStore) -> Vectors:
    return np.concatenate(list(HashEncoder(SPEC).encode_passages(store.corpus)))


@pytest.fixture
def copy(store: VectorStore, tmp_path: Path) -> Path:
    return shutil.copytree(store.directory, tmp_path / "copy")


def test_passages_and_vectors_are_in_the_order_of_the_corpus(store: VectorStore, expected: Vectors) -> None:
    assert [passage.id for passage in store.corpus] == [f"p{i}" for i in range(COUNT)]
    assert len(store) == COUNT
    assert np.array_equal(store.read(0, COUNT), expected)


@given(bounds=st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)).map(sorted))
def test_any_run_of_rows_can_be_read(store: VectorStore, expected: Vectors, bounds: list[int]) -> None:
    start, stop = bounds
    vectors = store.read(start, stop)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected[start:stop])


@given(rows=st.lists(st.integers(0, COUNT - 1), max_size=40).map(sorted))
def test_any_ascending_rows_can_be_sampled(store: VectorStore, expected: Vectors, rows: list[int]) -> None:
    assert np.array_equal(store.sample(rows), expected[rows].reshape(-1, DIMENSION))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (5, 4), (0, COUNT + 1)])
def test_rows_outside_are_an_error(store: VectorStore, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"of {COUNT} vectors"):
        store.read(start, stop)


def test_sample_of_unsorted_rows_is_an_error(store: VectorStore) -> None:
    with pytest.raises(ValueError, match="ascend"):
        store.sample([3, 1])


def test_reading_maps_no_files(store: VectorStore) -> None:
    vectors = store.read(0, COUNT)
    assert len(vectors) and str(store.directory / "shards") not in Path("/proc/self/maps").read_text()


def test_shards_are_numpy_files(store: VectorStore, expected: Vectors) -> None:
    names = [shard.name for shard in store.manifest.shards]
    assert names == ["00000.npy", "00001.npy", "00002.npy", "00003.npy"]
    assert np.array_equal(np.concatenate([np.load(store.directory / "shards" / n) for n in names]), expected)


def test_half_the_bytes_give_rounded_vectors(tmp_path: Path, expected: Vectors) -> None:
    store = encode(tmp_path, store_dtype="float16")
    assert store.manifest.row_bytes == 2 * DIMENSION
    assert store.read(0, COUNT).dtype == np.float32
    assert np.array_equal(store.read(10, 90), expected[10:90].astype(np.float16).astype(np.float32))
    assert np.array_equal(store.sample([1, 149]), expected[[1, 149]].astype(np.float16).astype(np.float32))


def test_manifest_says_what_the_vectors_are(store: VectorStore) -> None:
    manifest = VectorStore.open(store.directory).manifest
    assert manifest == store.manifest
    assert (manifest.count, manifest.dimension, manifest.dtype) == (COUNT, DIMENSION, "float32")
    assert manifest.encoder == HashEncoder(SPEC).spec
    assert [(shard.first_row, shard.rows) for shard in manifest.shards] == [
        (0, 40),
        (40, 40),
        (80, 40),
        (120, 30),
    ]


def test_other_vectors_have_another_fingerprint(store: VectorStore, tmp_path: Path) -> None:
    assert encode(tmp_path, shard_rows=75).manifest.fingerprint != store.manifest.fingerprint
    assert (
        encode(tmp_path, shard_rows=75).manifest.fingerprint
        == VectorStore.open(tmp_path / "vectors").manifest.fingerprint
    )


def test_directory_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="holds no vectors"):
        VectorStore.open(tmp_path)


def test_unfinished_store_is_refused(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(RetrieverError, match="not finished; run the same command again"):
        VectorStore.open(copy)


@pytest.mark.parametrize("name", ["passages.arrow", "shards/00002.npy"])
def test_missing_and_cut_files_are_named(copy: Path, name: str) -> None:
    size = (copy / name).stat().st_size
    with open(copy / name, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(RetrieverError, match=rf"{name} has {size - 1} bytes, expected {size}"):
        VectorStore.open(copy)
    (copy / name).unlink()
    with pytest.raises(RetrieverError, match=rf"{name} is missing"):
        VectorStore.open(copy)


def test_file_that_shrinks_while_it_is_open_is_noticed(copy: Path) -> None:
    store = VectorStore.open(copy)
    with open(copy / "shards" / "00001.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(RetrieverError, match=r"00001\.npy was cut short"):
        store.read(0, COUNT)
    (copy / "shards" / "00001.npy").unlink()
    with pytest.raises(RetrieverError, match=r"00001\.npy: cannot be read"):
        store.read(0, COUNT)
    assert store.read(0, SHARD_ROWS).shape == (SHARD_ROWS, DIMENSION)


@pytest.mark.parametrize("name", ["passages.arrow", "shards/00003.npy"])
def test_one_flipped_bit_is_found(copy: Path, name: str) -> None:
    VectorStore.open(copy).verify()
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(RetrieverError, match=rf"{name} was changed"):
        VectorStore.open(copy).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format 99, this program reads 1"),
        ({"count": "many"}, "is damaged"),
        ({"shards": [{"name": "00000.npy"}]}, "is damaged"),
    ],
)
def test_manifest_of_another_form_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(RetrieverError, match=message):
        VectorStore.open(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"version": 1'])
def test_damaged_manifest_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(RetrieverError, match=r"manifest\.json is damaged"):
        VectorStore.open(copy)
