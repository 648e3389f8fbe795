"""Indexes that FAISS alone wrote, taken over with their corpus and encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.building import importing
from retriever_service.building.importing import import_index
from retriever_service.cli import app
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.store import verify_checksums
from retriever_service.passages.corpus import Passage
from retriever_service.search.engine import SearchEngine, SearchOptions
from tests.retriever_service.support import DIMENSION, HashEncoder, load_hash_encoder, write_jsonl

SPEC = EncoderSpec("minilm", query_prefix="", passage_prefix="")
COUNT = 300
QUERIES = ["who makes number 7", "the harp of 1904", "nothing of it", "place 12 made in"]
ROWS = [
    {"id": f"p{i}", "title": f"Harp {i}", "text": f"number {i} was made in place {i % 40} of 19{i % 90:02d}"}
    for i in range(COUNT)
]
ENCODER = HashEncoder(SPEC)


def vectors(form: str = "{title} {text}", encoder: HashEncoder = ENCODER) -> np.ndarray:
    passages = [Passage(row["id"], "", form.format(**row)) for row in ROWS]
    return np.concatenate(list(encoder.encode_passages(passages)))


def written(path: Path, factory: str = "Flat", given: np.ndarray | None = None, **options: Any) -> Path:
    """By FAISS alone."""
    values = vectors() if given is None else given
    index = faiss.index_factory(values.shape[1], factory, options.get("metric", faiss.METRIC_INNER_PRODUCT))
    index.train(values)
    index.add(values)
    faiss.write_index(index, str(path))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", ROWS)


def imported(index: Path, corpus: Path, out: Path, **options: Any) -> SearchEngine:
    import_index(index, [corpus], out, SPEC, load_encoder=load_hash_encoder, **options)
    verify_checksums(out)
    return SearchEngine.open(out, load_encoder=load_hash_encoder)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("Flat", ""),
        ("SQ8", ""),
        ("IVF8,SQ8", "nprobe=4"),
        ("HNSW16", "efSearch=64"),
        ("OPQ8_16,IVF4,PQ8x4", "nprobe=3"),
    ],
)
def test_an_imported_index_finds_what_faiss_finds(
    tmp_path: Path, corpus: Path, factory: str, parameters: str
) -> None:
    file = written(tmp_path / "own.index", factory)
    engine = imported(file, corpus, tmp_path / "index", search_parameters=parameters)
    index = faiss.read_index(str(file))
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    scores, rows = index.search(ENCODER.encode_queries(QUERIES), 10)
    for found, own_scores, own_rows in zip(
        engine.search(QUERIES, 10, SearchOptions()), scores, rows, strict=True
    ):
        assert [hit.score for hit in found] == pytest.approx(own_scores.tolist(), abs=1e-5)
        assert {hit.passage.id for hit in found} == {f"p{row}" for row in own_rows}


@pytest.mark.parametrize("form", ['"{title}"\n{text}', "{title}\n{text}", "{text}"])
def test_passages_may_have_been_put_before_the_encoder_in_another_form(
    tmp_path: Path, corpus: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "own.index", given=vectors(form))
    assert len(imported(file, corpus, tmp_path / "index").search(QUERIES, 3, SearchOptions())) == len(QUERIES)


def test_the_rows_of_pyserini_are_in_the_order_of_its_ids(tmp_path: Path) -> None:
    folder = tmp_path / "pyserini"
    folder.mkdir()
    written(folder / "index")
    (folder / "docid").write_text("".join(f"{row['id']}\n" for row in ROWS))
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", ROWS[::-1])
    engine = imported(folder, shuffled, tmp_path / "index")
    (hits,) = engine.search(["harp 17 number 17 was made in place 17 of 1917"], 1, SearchOptions())
    assert hits[0].passage.id == "p17"
    (folder / "docid").write_text("p0\np1\np0\n")
    with pytest.raises(RetrieverError, match=r"docid: 'p0' \(id 3\) comes again"):
        imported(folder, shuffled, tmp_path / "other")
    (folder / "docid").write_text("")
    with pytest.raises(RetrieverError, match=r"has 300 vectors, .* 0 passages"):
        imported(folder, shuffled, tmp_path / "other")
    (folder / "docid").write_text("nobody\n")
    with pytest.raises(RetrieverError, match=r"docid: the corpus has no passage 'nobody' \(id 1\)"):
        imported(folder, shuffled, tmp_path / "other")


def other_encoder(spec: EncoderSpec, device: str) -> HashEncoder:
    class Other(HashEncoder):
        def _vector(self, text: str) -> np.ndarray:
            return super()._vector(text[::-1])

    return Other(spec)


def longer_encoder(spec: EncoderSpec, device: str) -> HashEncoder:
    class Longer(HashEncoder):
        def _vector(self, text: str) -> np.ndarray:
            return 3 * super()._vector(text)

    return Longer(spec)


def prefixed_encoder(spec: EncoderSpec, device: str) -> HashEncoder:
    class Prefixed(HashEncoder):
        def _vector(self, text: str) -> np.ndarray:
            return super()._vector(f"passage: {text}")

    return Prefixed(spec)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (other_encoder, "not of this corpus, in this order, or not of encoder"),
        (
            prefixed_encoder,
            r"passage prefix .* the median distance of 256 passages is 0\.\d+ of their length",
        ),
        (longer_encoder, "their lengths differ by the factor 0.33"),
    ],
)
def test_another_encoder_is_refused_and_leaves_nothing(
    tmp_path: Path, corpus: Path, load: Any, message: str
) -> None:
    file = written(tmp_path / "own.index")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RetrieverError, match=message):
        import_index(file, [corpus], tmp_path / "index", SPEC, load_encoder=load)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    imported(file, corpus, tmp_path / "index")


def off_by(share: float) -> Any:
    """Loads an encoder whose vectors lie so far from those of the index, each in a direction of its own."""

    class Off(HashEncoder):
        def _vector(self, text: str) -> np.ndarray:
            exact, elsewhere = super()._vector(text), super()._vector(text[::-1])
            across = elsewhere - (elsewhere @ exact) * exact
            return exact + share * across / np.linalg.norm(across)

    return lambda spec, device: Off(spec)


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "PQ16x4", "IVF8,Flat", "OPQ8_16,PQ8x4"])
def test_a_small_change_is_a_matter_of_number_formats_and_a_wrong_prefix_is_not(
    tmp_path: Path, corpus: Path, factory: str
) -> None:
    """Both as with real encoders, whatever the codes lose: bfloat16 is 0.01 away, a prefix at least 0.03."""
    file = written(tmp_path / "own.index", factory)
    how = {"search_parameters": "nprobe=8"} if factory.startswith("IVF") else {}
    with pytest.raises(RetrieverError, match="is of this corpus, but its vectors are not those of encoder"):
        import_index(file, [corpus], tmp_path / "i", SPEC, load_encoder=off_by(0.08), **how)  # type: ignore[arg-type]
    import_index(file, [corpus], tmp_path / "i", SPEC, load_encoder=off_by(0.01), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:-1], "has 300 vectors, .* 299 passages"),
        (ROWS[::-1], "not of this corpus, in this order"),
        (
            [row | {"text": "something else"} if n % 8 == 0 else row for n, row in enumerate(ROWS)],
            r"of 256 passages that were encoded are other texts .* passage 'p\d+'",
        ),
        (
            [{**row, "text": f"something else {n * n}", "title": ""} for n, row in enumerate(ROWS)],
            "not of this corpus",
        ),
    ],
    ids=["another number", "another order", "an eighth of other texts", "other texts"],
)
def test_another_corpus_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(RetrieverError, match=message):
        imported(written(tmp_path / "own.index"), corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_is_searched_in_another_way_is_refused(tmp_path: Path, corpus: Path) -> None:
    def refused(file: Path, message: str, **options: Any) -> None:
        with pytest.raises(RetrieverError, match=message):
            imported(file, corpus, tmp_path / "index", **options)

    refused(written(tmp_path / "l2", metric=faiss.METRIC_L2), "searched by a distance")
    refused(written(tmp_path / "ivf", "IVF8,Flat"), "say with --search-parameters .* nprobe=64")
    refused(
        written(tmp_path / "wide", given=np.ones((COUNT, DIMENSION + 8), np.float32)), f"gives {DIMENSION}"
    )
    refused(written(tmp_path / "own"), "do not fit this index", search_parameters="nprobe=3")
    refused(tmp_path / "nothing", "there is no index")
    (tmp_path / "text").write_text("no index")
    refused(tmp_path / "text", "FAISS cannot read it")
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(DIMENSION))
    mapped.add_with_ids(vectors(), np.arange(COUNT) + 5)
    faiss.write_index(mapped, str(tmp_path / "mapped"))
    refused(tmp_path / "mapped", "IndexIDMap")


def test_an_import_that_was_cut_off_goes_on_and_another_one_in_its_place_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "own.index")

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing.shutil, "copyfile", power_cut)
        with pytest.raises(KeyboardInterrupt):
            imported(file, corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(RetrieverError, match="unfinished build of another index"):
        imported(written(tmp_path / "other.index", "SQ8"), corpus, tmp_path / "index")
    imported(file, corpus, tmp_path / "index")
    with pytest.raises(RetrieverError, match="holds an index already"):
        imported(file, corpus, tmp_path / "index")


def test_a_link_takes_no_room_and_words_can_be_searched_too(tmp_path: Path, corpus: Path) -> None:
    file = written(tmp_path / "own.index")
    engine = imported(file, corpus, tmp_path / "index", link=True, bm25=True)
    assert (tmp_path / "index/segments/0000/index.faiss").samefile(file)
    (hits,) = engine.search(["Harp 17"], 1, SearchOptions(method="bm25"))
    assert hits[0].passage.id == "p17"


def test_the_command_says_what_it_took_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importing.import_index,
        "__kwdefaults__",
        {**(importing.import_index.__kwdefaults__ or {}), "load_encoder": load_hash_encoder},
    )
    file = written(tmp_path / "own.index", "IVF8,Flat")
    arguments = ["import", str(file), "--corpus", str(corpus), "--out", str(tmp_path / "index")]
    result = CliRunner().invoke(app, [*arguments, "--search-parameters", "nprobe=4"])
    assert result.exit_code == 0, result.output
    assert "300 passages, 32 dimensions, IndexIVFFlat" in result.output
    assert json.loads((tmp_path / "index/manifest.json").read_text())["search_parameters"] == "nprobe=4"
