"""The bundled sentence encoder: offline, deterministic whatever the batch, identified by what it computes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retriever_service.encoding.encoder import Encoder, EncoderSpec, _resolve, bundled_model, lasting_name
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage, passage_text

QUERIES = [
    "who wrote it?",
    "In which city was the director of the film that won the first prize born?",
    "lion",
    "the capital of France",
    "What is the population of the country whose flag has a red maple leaf, as of the latest census?",
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(EncoderSpec(dtype="float32"))


def test_what_the_spec_leaves_open_is_filled_in(encoder: Encoder) -> None:
    assert encoder.spec == EncoderSpec(
        "minilm", "", "", normalise=True, max_length=256, dtype="float32", passage_template="{title} {text}"
    )
    assert encoder.dimension == 384


COMPANY = """
import os, sys
import numpy as np
from retriever_service.encoding.encoder import Encoder, EncoderSpec
encoder, queries = Encoder.load(EncoderSpec(dtype=sys.argv[1])), sys.argv[2:] * 3
together = encoder.encode_queries(queries)
alone = np.concatenate([encoder.encode_queries([query]) for query in queries])
print(np.array_equal(together, alone), os.environ.get("MKL_CBWR"))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vector_of_a_query_does_not_depend_on_its_company(dtype: str) -> None:
    """In a process of its own: what MKL computes with is settled at the first product of a process."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    told = subprocess.run(
        [sys.executable, "-c", COMPANY, dtype, *QUERIES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["True", "None"]


def test_encoding_leaves_the_memory_of_gpus_to_torch(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 4 of reference servers: the cache of the GPU is emptied after every batch."""

    def empty() -> None:
        raise AssertionError("emptied")

    monkeypatch.setattr("torch.cuda.empty_cache", empty)
    encoder.encode_queries(["lion"])
    assert len(list(encoder.encode_passages([Passage("1", "", "lion")]))) == 1


def test_vectors_are_float32_of_unit_length(encoder: Encoder) -> None:
    vectors = encoder.encode_queries(QUERIES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.encode_queries([]).shape == (0, 384)


def test_weights_of_16_bits_keep_the_guarantees_and_nearly_the_vectors(encoder: Encoder) -> None:
    half = Encoder.load(EncoderSpec(dtype="bfloat16"))
    test_vectors_are_float32_of_unit_length(half)
    assert half.fingerprint != encoder.fingerprint
    cosines = (half.encode_queries(QUERIES) * encoder.encode_queries(QUERIES)).sum(axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize(("instructions", "dtype"), [("avx512_bf16", "bfloat16"), ("avx512_f", "float32")])
def test_weights_have_16_bits_where_the_processor_computes_in_them(
    monkeypatch: pytest.MonkeyPatch, instructions: str, dtype: str
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {instructions: True})
    assert Encoder.load(EncoderSpec()).spec.dtype == dtype


@pytest.mark.parametrize("given", ["encoder", "./encoder", "../here/encoder", "~/encoder"])
def test_a_directory_is_the_same_encoder_from_any_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "encoder").symlink_to(bundled_model())
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path / "here")
    spec = Encoder.load(EncoderSpec(given)).spec
    monkeypatch.chdir("/")
    assert Encoder.load(spec).spec == spec


def test_names_that_are_no_directories_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the bundled encoder's, where a directory happens to be called so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    for name in ("minilm", "intfloat/e5-base-v2", "./not-there"):
        assert lasting_name(name) == name


def test_pooling_is_known_by_name(encoder: Encoder) -> None:
    assert encoder.pooling == "mean"


def test_passages_of_all_lengths_come_back_in_their_order(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever_service.encoding.encoder.WINDOW_PASSAGES", 16)
    passages = [Passage(str(i), f"T{i}", "the lion lives on the savanna " * (i * 7 % 19)) for i in range(40)]
    told = list[int]()
    windows = list(encoder.encode_passages(passages, told.append))
    assert [len(window) for window in windows] == [16, 16, 8]
    assert sum(told) == 40
    alone = [next(encoder.encode_passages([passage]))[0] for passage in passages]
    np.testing.assert_allclose(np.concatenate(windows), alone, atol=1e-5)


def test_progress_moves_before_a_window_is_whole(encoder: Encoder) -> None:
    passages = [Passage(str(i), "", "otter " * 100) for i in range(100)]
    told = list[int]()
    next(encoder.encode_passages(passages, told.append))
    assert len(told) > 1
    assert sum(told) == 100


def test_same_passages_give_the_same_vectors_to_the_last_bit(encoder: Encoder) -> None:
    passages = [Passage(str(i), "", "otter " * (1 + i % 13)) for i in range(50)]
    first, second = (np.concatenate(list(encoder.encode_passages(passages))) for _ in range(2))
    assert np.array_equal(first, second)


def test_question_is_closest_to_its_passage(encoder: Encoder) -> None:
    passages = [
        Passage("1", "Paris", "Paris is the capital and largest city of France."),
        Passage("2", "Lion", "The lion is a large cat of Africa and India."),
    ]
    vectors = np.concatenate(list(encoder.encode_passages(passages)))
    scores = encoder.encode_queries(["the capital of France", "big African cats"]) @ vectors.T
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_passage_is_encoded_with_its_title() -> None:
    assert passage_text(Passage("1", "Paris", "A city.")) == "Paris A city."
    assert passage_text(Passage("1", "", "A city.")) == "A city."


def test_prefixes_change_vectors_and_fingerprint(encoder: Encoder) -> None:
    prefixed = Encoder.load(EncoderSpec(query_prefix="query: ", dtype="float32"))
    assert prefixed.fingerprint != encoder.fingerprint
    assert np.array_equal(prefixed.encode_queries(["lion"]), encoder.encode_queries(["query: lion"]))


def test_copy_in_another_directory_is_the_same_encoder(encoder: Encoder, tmp_path: Path) -> None:
    copy = shutil.copytree(bundled_model(), tmp_path / "copy-of-minilm")
    loaded = Encoder.load(EncoderSpec(str(copy), dtype="float32"))
    assert loaded.fingerprint == encoder.fingerprint
    assert dataclasses.replace(loaded.spec, model="minilm") == encoder.spec


@pytest.mark.parametrize("max_length", [0, 513])
def test_length_that_the_model_cannot_take_is_refused(max_length: int) -> None:
    with pytest.raises(RetrieverError, match=f"max_length {max_length}, but it takes 1 to 512"):
        Encoder.load(EncoderSpec(max_length=max_length))


def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RetrieverError, match="torch finds no GPU"):
        Encoder.load(EncoderSpec(), "cuda")


def test_model_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RetrieverError, match="nowhere' cannot be loaded"):
        Encoder.load(EncoderSpec(str(tmp_path / "nowhere")))


class StubModel:
    """As much of a sentence-transformers model as the resolution of a spec looks at."""

    def __init__(self, prompts: dict[str, str] | None = None, model_type: str = "bert") -> None:
        self.prompts = prompts or {"query": "", "document": ""}
        self.max_seq_length = 514
        self._config = SimpleNamespace(max_position_embeddings=514, model_type=model_type, pad_token_id=1)

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(auto_model=SimpleNamespace(config=self._config))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intfloat/e5-base-v2", ("query: ", "passage: ", True)),
        ("intfloat/multilingual-e5-large", ("query: ", "passage: ", True)),
        ("BAAI/bge-small-en-v1.5", ("Represent this sentence for searching relevant passages: ", "", True)),
        ("facebook/contriever-msmarco", ("", "", False)),
        ("sentence-transformers/all-MiniLM-L12-v2", ("", "", True)),
        ("someone/unknown", ("find: ", "store: ", True)),
    ],
)
def test_known_families_get_the_prefixes_they_were_trained_with(
    name: str, expected: tuple[str, str, bool]
) -> None:
    stub: Any = StubModel({"query": "find: ", "document": "store: "})
    spec = _resolve(EncoderSpec(name), stub)
    assert (spec.query_prefix, spec.passage_prefix, spec.normalise) == expected


def test_given_prefixes_win_over_the_family() -> None:
    stub: Any = StubModel()
    spec = _resolve(EncoderSpec("intfloat/e5-base-v2", query_prefix="", normalise=False), stub)
    assert (spec.query_prefix, spec.passage_prefix, spec.normalise) == ("", "passage: ", False)


def test_positions_that_roberta_models_reserve_are_not_offered() -> None:
    stub: Any = StubModel(model_type="xlm-roberta")
    assert _resolve(EncoderSpec("m"), stub).max_length == 512
