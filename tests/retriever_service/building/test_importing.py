"""Indexes that FAISS alone wrote, taken over with their corpus and encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.building import importing
from retriever_service.building.importing import import_index
from retriever_service.cli import app
from retriever_service.encoding.encoder import Encoder, EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.store import verify_checksums
from retriever_service.passages.corpus import Passage, read_corpus
from retriever_service.search.engine import SearchEngine, SearchOptions
from tests.retriever_service.support import DIMENSION, HashEncoder, load_hash_encoder, real_data, write_jsonl

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


REAL = EncoderSpec(
    "minilm", "", "passage: ", max_length=256, dtype="float32", passage_template='"{title}"\n{text}'
)


@pytest.fixture(scope="module")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 passages of Wikipedia, some of them longer than the encoder reads, as Search-R1 indexes them."""
    folder = tmp_path_factory.mktemp("real")
    source = real_data("hotpotqa") / "corpus.jsonl"
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(source.read_text().splitlines(keepends=True)[:200]))
    given = np.concatenate(list(Encoder.load(REAL, "cpu").encode_passages(read_corpus([corpus]))))
    return written(folder / "own.index", given=given), corpus


def imported(index: Path, corpus: Path, out: Path, spec: EncoderSpec = SPEC, **options: Any) -> SearchEngine:
    import_index(index, [corpus], out, spec, load_encoder=load_hash_encoder, **options)
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


@pytest.mark.parametrize("form", ['"{title}"\n{text}', "{text}", "{title} -- {text}"])
def test_titles_are_put_before_texts_as_in_the_index_also_of_passages_that_are_added(
    tmp_path: Path, corpus: Path, form: str
) -> None:
    file = written(tmp_path / "own.index", given=vectors(form))
    spec, usual = replace(SPEC, passage_template=form), form != "{title} -- {text}"
    if not usual:
        with pytest.raises(RetrieverError, match=r"--passage-template \(here '{title} {text}'\)"):
            imported(file, corpus, tmp_path / "index")
    engine = imported(file, corpus, tmp_path / "index", spec=SPEC if usual else spec)
    assert engine.manifest.encoder.passage_template == form
    new = Passage("new", "Silver Harp", "of another maker")
    engine.add([new])
    index = faiss.read_index(str(tmp_path / "index/segments/0001/index.faiss"))
    (expected,) = HashEncoder(spec).encode_passages([new])
    assert index.reconstruct(0) == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize("template", ["{title}", "{text", "{text} {author}", "{text} {}"])
def test_a_template_that_cannot_be_filled_is_refused(tmp_path: Path, corpus: Path, template: str) -> None:
    with pytest.raises(RetrieverError, match=r"it must hold \{text\}"):
        imported(
            written(tmp_path / "own.index"),
            corpus,
            tmp_path / "index",
            spec=replace(SPEC, passage_template=template),
        )


def test_an_approximate_index_is_tuned_unless_it_is_said_how_it_is_searched(
    tmp_path: Path, corpus: Path
) -> None:
    file = written(tmp_path / "own.index", "IVF16,SQ8")
    tuned = imported(file, corpus, tmp_path / "tuned", target_recall=0.9).manifest
    (chosen,) = [point for point in tuned.recall if point.search_parameters == tuned.search_parameters]
    assert chosen.recall["10"] >= 0.9
    told = imported(file, corpus, tmp_path / "told", search_parameters="nprobe=3").manifest
    assert (told.search_parameters, told.recall) == ("nprobe=3", ())


@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8", "HNSW16", "PCA16,SQ8"])
def test_distances_of_vectors_of_length_1_are_searched_as_inner_products(
    tmp_path: Path, corpus: Path, factory: str
) -> None:
    file = written(tmp_path / "own.index", factory, metric=faiss.METRIC_L2)
    engine = imported(file, corpus, tmp_path / "index")
    index = faiss.read_index(str(file))
    if parameters := engine.manifest.search_parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    distances, rows = index.search(ENCODER.encode_queries(QUERIES), 10)
    for found, own_distances, own_rows in zip(
        engine.search(QUERIES, 10, SearchOptions()), distances, rows, strict=True
    ):
        assert [hit.score for hit in found] == pytest.approx((1 - own_distances / 2).tolist(), abs=1e-5)
        assert {hit.passage.id for hit in found} == {f"p{row}" for row in own_rows}


def test_distances_of_vectors_of_other_lengths_are_refused(tmp_path: Path, corpus: Path) -> None:
    file = written(tmp_path / "own.index", given=3 * vectors(), metric=faiss.METRIC_L2)
    with pytest.raises(RetrieverError, match=r"L2 distances, and its vectors are 3\.000 to 3\.000 long"):
        import_index(file, [corpus], tmp_path / "index", SPEC, load_encoder=longer_encoder)


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


@pytest.mark.component
@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param({"max_length": 250}, "another number of tokens than 250", marks=pytest.mark.chaos),
        pytest.param({"max_length": 200}, "another number of tokens than 200", marks=pytest.mark.chaos),
        ({"max_length": 128}, "another number of tokens than 128"),
        ({"passage_prefix": "query: "}, r"--passage-prefix \(here 'query: '\)"),
        pytest.param({"passage_prefix": ""}, r"--passage-prefix \(here ''\)", marks=pytest.mark.chaos),
        ({"passage_template": "{text}"}, r"--passage-template \(here '{text}'\)"),
    ],
)
def test_of_real_passages_and_a_real_encoder_every_difference_shows(
    real_index: tuple[Path, Path], tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    file, corpus = real_index
    with pytest.raises(RetrieverError, match=message):
        import_index(file, [corpus], tmp_path / "index", replace(REAL, **how))
    assert not (tmp_path / "index").exists()


@pytest.mark.component
def test_of_real_passages_a_few_in_another_order_show_and_number_formats_do_not(
    real_index: tuple[Path, Path], tmp_path: Path
) -> None:
    file, corpus = real_index
    rows = corpus.read_text().splitlines(keepends=True)
    bent = tmp_path / "bent.jsonl"
    bent.write_text("".join([*rows[:-16], *rows[:-17:-1]]))
    with pytest.raises(RetrieverError, match="holds vectors of other texts: 1"):
        import_index(file, [bent], tmp_path / "index", REAL)
    imported = import_index(
        file, [corpus], tmp_path / "index", replace(REAL, passage_template=None, dtype="bfloat16")
    )
    assert imported.encoder.passage_template == REAL.passage_template


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
            r"are 0\.\d+ of their length away from it, .* of 256 passages; .* --passage-prefix",
        ),
        (longer_encoder, r"They are 0\.333 times as long: .* --normalise or --no-normalise"),
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
    """Both as with real encoders, whatever the codes lose (docs/retriever.md)."""
    file = written(tmp_path / "own.index", factory)
    with pytest.raises(RetrieverError, match="is of this corpus, but its vectors are not those of encoder"):
        import_index(file, [corpus], tmp_path / "i", SPEC, load_encoder=off_by(0.08))
    import_index(file, [corpus], tmp_path / "i", SPEC, load_encoder=off_by(0.01))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:-1], "has 300 vectors, .* 299 passages"),
        (ROWS[::-1], "not of this corpus, in this order"),
        (
            [row | {"text": "something else"} if n % 8 == 0 else row for n, row in enumerate(ROWS)],
            r"holds vectors of other texts: \d\d of 256 passages .* the first is passage 'p\d+' in row \d+",
        ),
        (
            [*ROWS[:100], ROWS[103], *ROWS[101:103], ROWS[100], *ROWS[104:]],
            "holds vectors of other texts: 2 of 256 passages .* the first is passage 'p103' in row 100",
        ),
        (
            [{**row, "text": f"something else {n * n}", "title": ""} for n, row in enumerate(ROWS)],
            "not of this corpus",
        ),
    ],
    ids=[
        "another number",
        "another order",
        "an eighth of other texts",
        "two in another order",
        "other texts",
    ],
)
def test_another_corpus_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(RetrieverError, match=message):
        imported(written(tmp_path / "own.index"), corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("limit", [60, 50, 20])
def test_another_number_of_tokens_is_refused_though_few_texts_are_so_long(tmp_path: Path, limit: int) -> None:
    """61 words in one passage of fifty."""
    rows = [
        row | {"text": " ".join([row["text"], *(f"w{n}-{i}" for i in range(52 * (n % 50 == 0)))])}
        for n, row in enumerate(ROWS)
    ]
    given = np.concatenate([ENCODER._vector("{title} {text}".format(**row))[None] for row in rows])
    file, corpus = written(tmp_path / "own.index", given=given), write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(
        RetrieverError, match=rf"another number of tokens than {limit}\W+[Gg]ive --max-tokens"
    ):
        imported(file, corpus, tmp_path / "index", spec=replace(SPEC, max_length=limit))
    imported(file, corpus, tmp_path / "index", spec=replace(SPEC, max_length=70))


def test_what_is_searched_in_another_way_is_refused(tmp_path: Path, corpus: Path) -> None:
    def refused(file: Path, message: str, **options: Any) -> None:
        with pytest.raises(RetrieverError, match=message):
            imported(file, corpus, tmp_path / "index", **options)

    refused(written(tmp_path / "l1", metric=faiss.METRIC_L1), "searched by FAISS's metric 2")
    refused(
        written(tmp_path / "wide", given=np.ones((COUNT, DIMENSION + 8), np.float32)), f"gives {DIMENSION}"
    )
    refused(written(tmp_path / "own"), "do not fit this index", search_parameters="nprobe=3")
    refused(tmp_path / "nothing", "there is no index")
    (tmp_path / "text").write_text("no index")
    refused(tmp_path / "text", "FAISS cannot read it")
    whole = written(tmp_path / "whole").read_bytes()
    (tmp_path / "part_aa").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "part_aa", r"join them all first: cat part_\* > joined.index")
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(DIMENSION))
    mapped.add_with_ids(vectors(), np.arange(COUNT) + 5)
    faiss.write_index(mapped, str(tmp_path / "mapped"))
    refused(tmp_path / "mapped", "IndexIDMap")
    numbered = faiss.index_factory(DIMENSION, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    numbered.train(vectors())
    numbered.add_with_ids(vectors(), np.arange(COUNT) // 2)
    faiss.write_index(numbered, str(tmp_path / "numbered"))
    refused(tmp_path / "numbered", "cannot be told row by row.* add_with_ids")


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
    assert "300 passages, 32 dimensions, IVF8,Flat" in result.output
    assert json.loads((tmp_path / "index/manifest.json").read_text())["search_parameters"] == "nprobe=4"
