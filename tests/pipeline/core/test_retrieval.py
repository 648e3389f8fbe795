"""Which index a run searches. A small hashing encoder stands in for the sentence encoder; FAISS is real."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import faiss
import pytest
from rich.console import Console

from pipeline.core.config import RetrieverConfig
from pipeline.core.config.loading import load_config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.noise import depth_with_noise
from pipeline.core.retrieval import Servers, await_servers, corpus_paths, encoder_spec, prepare_index
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.store import read_manifest
from retriever_service.machine import available_cores
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.support import HashEncoder


class HashingEncoder(HashEncoder):
    """Encoders whose directories have the same name are the same; `missing` cannot be loaded."""

    def __init__(self, spec: EncoderSpec, device: str = "cpu") -> None:
        if spec.model == "missing":
            raise RetrieverError("encoder 'missing' cannot be loaded")
        super().__init__(replace(spec, max_length=spec.max_length or 256))
        same = replace(self.spec, model=Path(spec.model).name)
        self.fingerprint = hashlib.sha256(repr(same).encode()).hexdigest()


@pytest.fixture(autouse=True)
def hashing_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.core.retrieval.build_index", partial(build_index, load_encoder=HashingEncoder)
    )
    monkeypatch.setattr("pipeline.core.retrieval.Encoder.load", HashingEncoder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "corpus.jsonl"
    path.parent.mkdir()
    rows = [{"id": f"p{i}", "title": "", "text": f"Passage number {i}."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(tmp_path: Path, *overrides: str) -> Path:
    config = load_config(None, [f"data.root={tmp_path / 'data'}", *overrides])
    return prepare_index(
        config.retriever, config.data, tmp_path / "run" / "index", Display(Console(file=io.StringIO()))
    )


def test_an_index_is_built_on_all_cores_also_where_the_environment_says_one(
    corpus: Path, tmp_path: Path
) -> None:
    faiss.omp_set_num_threads(1)  # as OMP_NUM_THREADS of a job of Ray's does
    prepare(tmp_path, "data.corpus=corpus.jsonl")
    assert faiss.omp_get_max_threads() == available_cores()


def test_corpus_files_lie_below_the_root_and_data_sets_of_the_hub_do_not() -> None:
    given = "data.corpus=[a.jsonl, /abs/b.jsonl, 'hf:name:config']"
    assert corpus_paths(load_config(None, ["data.root=/data", given]).data) == [
        "/data/a.jsonl",
        "/abs/b.jsonl",
        "hf:name:config",
    ]
    assert corpus_paths(load_config(None, ["data.corpus=a.jsonl"]).data) == ["a.jsonl"]


def test_the_encoder_is_the_configured_one() -> None:
    overrides = [
        "retriever.encoder=intfloat/e5-base-v2",
        "retriever.query_prefix='q: '",
        "retriever.max_tokens=64",
    ]
    assert encoder_spec(load_config(None, overrides).retriever) == EncoderSpec(
        "intfloat/e5-base-v2", "q: ", None, None, 64
    )


def test_an_index_is_built_from_the_corpus_once(tmp_path: Path, corpus: Path) -> None:
    index = prepare(tmp_path, "data.corpus=corpus.jsonl")
    assert index == tmp_path / "run" / "index"
    assert read_manifest(index).count == 4
    written = (index / "manifest.json").stat().st_mtime_ns
    assert prepare(tmp_path, "data.corpus=corpus.jsonl") == index
    assert (index / "manifest.json").stat().st_mtime_ns == written


def test_a_corpus_that_changed_is_refused_and_the_index_kept(tmp_path: Path, corpus: Path) -> None:
    index = prepare(tmp_path, "data.corpus=corpus.jsonl")
    corpus.write_text(corpus.read_text().replace("number 3", "number three"))
    with pytest.raises(RetrieverError, match="holds another index"):
        prepare(tmp_path, "data.corpus=corpus.jsonl")
    assert read_manifest(index).count == 4


@pytest.mark.parametrize("method", ["bm25", "hybrid"])
def test_an_index_that_a_run_builds_has_words_where_it_is_to_search_by_them(
    tmp_path: Path, corpus: Path, method: str
) -> None:
    asked = ["data.corpus=corpus.jsonl", f"retriever.method={method}"]
    built = prepare(tmp_path, *asked)
    assert prepare(tmp_path, f"retriever.index={built}", asked[1]) == built


def test_an_index_without_words_is_refused_where_it_is_to_be_searched_by_them(
    tmp_path: Path, corpus: Path
) -> None:
    built = prepare(tmp_path, "data.corpus=corpus.jsonl")
    with pytest.raises(UserError, match=r"retriever\.method: hybrid needs an index of words.* --bm25"):
        prepare(tmp_path, f"retriever.index={built}", "retriever.method=hybrid")


@pytest.mark.parametrize("encoder", ["other", "missing"])
def test_a_run_does_not_go_on_with_another_encoder(tmp_path: Path, corpus: Path, encoder: str) -> None:
    prepare(tmp_path, "data.corpus=corpus.jsonl")
    with pytest.raises(RetrieverError, match=encoder):
        prepare(tmp_path, "data.corpus=corpus.jsonl", f"retriever.encoder={encoder}")


def test_without_corpus_and_index_there_is_nothing_to_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.corpus, or retriever\.index"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"corpus\.jsonl:5: not valid JSON"),
        ('{"id": "p9"}', r"corpus\.jsonl:5: no field 'text'"),
        ('{"id": "p0", "text": "Something else."}', r"corpus\.jsonl:5: id 'p0' appears twice"),
    ],
)
def test_a_mistake_in_the_corpus_is_named_and_leaves_no_index(
    tmp_path: Path, corpus: Path, line: str, message: str
) -> None:
    with corpus.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RetrieverError, match=message):
        prepare(tmp_path, "data.corpus=corpus.jsonl")
    assert list((tmp_path / "run").iterdir()) == []


# ---------------------------------------------------------------- a given index


@pytest.fixture
def index(tmp_path: Path, corpus: Path) -> Path:
    """An index that was built with the encoder minilm."""
    build_index([corpus], tmp_path / "built", EncoderSpec("minilm", "q: "), load_encoder=HashingEncoder)
    return tmp_path / "built"


def test_a_given_index_is_used_and_the_corpus_not_read(tmp_path: Path, index: Path) -> None:
    assert prepare(tmp_path, f"retriever.index={index}", "data.corpus=missing.jsonl") == index
    assert prepare(tmp_path, f"retriever.index={index}", "retriever.query_prefix='q: '") == index
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("retriever.encoder=e5", r"encoder 'minilm' .* encoder 'e5'"),
        ("retriever.query_prefix='query: '", r"query_prefix 'q: ' -> 'query: '"),
        ("retriever.max_tokens=64", "max_length 256 -> 64"),
        ("retriever.encoder=missing", "'missing' cannot be loaded"),
    ],
)
def test_an_index_of_another_encoder_is_refused(
    tmp_path: Path, index: Path, override: str, differs: str
) -> None:
    with pytest.raises(RetrieverError, match=differs):
        prepare(tmp_path, f"retriever.index={index}", override)


def test_the_same_encoder_in_another_place_is_accepted(tmp_path: Path, index: Path) -> None:
    settings = ("retriever.encoder=/copies/minilm", "retriever.query_prefix='q: '")
    assert prepare(tmp_path, f"retriever.index={index}", *settings) == index


@pytest.mark.parametrize("name", ["data", "nothing-here"])
def test_a_directory_that_is_no_index_is_refused(tmp_path: Path, corpus: Path, name: str) -> None:
    with pytest.raises(RetrieverError, match=f"{name} is not a built index"):
        prepare(tmp_path, f"retriever.index={tmp_path / name}")


# ---------------------------------------------------------------- servers


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedServer]]:
    monkeypatch.setattr("pipeline.core.retrieval.POLL_S", 0.001)
    monkeypatch.delenv("EXSEARCH_TOKEN", raising=False)
    started = [ScriptedServer(), ScriptedServer()]
    yield started
    for server in started:
        server.close()


def awaited(url: object, *overrides: str, timeout_s: float = 300.0) -> Servers:
    retriever = load_config(None, [f"retriever.url={url}", *overrides]).retriever
    display = Display(Console(file=io.StringIO()))
    found = await_servers(retriever, display, documents=2, timeout_s=timeout_s)
    assert found is not None
    return found


def test_without_an_address_there_are_no_servers() -> None:
    assert await_servers(RetrieverConfig(), Display(), documents=2, timeout_s=300) is None


def test_servers_that_answer_are_told_by_what_they_search(servers: list[ScriptedServer]) -> None:
    found = awaited([server.url for server in servers])
    assert [client.url for client in found.clients] == [server.url for server in servers]
    assert found.fingerprint == FakeEngine().fingerprint
    for server in servers:
        (path, body, token), (info, _, _) = server.requests
        assert (path, body["k"], token, info) == ("/search", 2, None, "/info")


def test_servers_are_asked_at_the_start_for_as_many_passages_as_noise_takes(
    servers: list[ScriptedServer],
) -> None:
    awaited(servers[0].url, "retriever.noise=0.3")  # one with a lower limit is refused now, not in the E-step
    assert servers[0].requests[0][1]["k"] == depth_with_noise(2, 0.3)


def test_search_r1_servers_cannot_tell_what_they_search(servers: list[ScriptedServer]) -> None:
    first, second = (awaited(server.url, "retriever.dialect=search-r1") for server in servers)
    assert first.fingerprint == second.fingerprint
    assert [path for path, _, _ in servers[0].requests] == ["/retrieve"]


def test_the_token_is_read_from_the_environment(
    servers: list[ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXSEARCH_TOKEN", "secret")
    awaited(servers[0].url)
    assert {token for _, _, token in servers[0].requests} == {"Bearer secret"}


def test_a_server_that_loads_is_waited_for(servers: list[ScriptedServer]) -> None:
    servers[0].script = [503, 503, 429]
    assert awaited(servers[0].url).fingerprint == FakeEngine().fingerprint
    assert len(servers[0].requests) == 5


def test_a_server_that_never_gets_ready_is_not_waited_for_without_end(servers: list[ScriptedServer]) -> None:
    servers[0].script = [503] * 10_000
    with pytest.raises(UserError, match=r"retriever\.url: no answer .*status 503: as scripted.*see its log"):
        awaited(servers[0].url, timeout_s=0.05)


@pytest.mark.parametrize(
    ("first_reply", "told"),
    [
        (401, r"401: as scripted.*token in EXSEARCH_TOKEN"),
        (404, r"404: as scripted.*without the route.*retriever\.dialect \(native\)"),
        ((200, {}, b"<html>"), r"does not answer as a native server does.*retriever\.dialect"),
        ((200, {}, b'{"result": []}'), "does not answer as a native server does"),
    ],
)
def test_a_server_that_will_not_answer_is_refused_at_once(
    servers: list[ScriptedServer], first_reply: object, told: str
) -> None:
    servers[0].script = [first_reply]
    with pytest.raises(UserError, match=told):
        awaited(servers[0].url)
    assert len(servers[0].requests) == 1


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1 .*ConnectError.*correct the address"):
        awaited("http://127.0.0.1:1")


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(RetrieverError, match="expected http://HOST:PORT"):
        awaited("localhost:8000")


def test_servers_of_different_indexes_are_refused(servers: list[ScriptedServer]) -> None:
    servers[1].script = [200, (200, {}, b'{"index": "another"}')]
    with pytest.raises(UserError, match=r"search different indexes:(.|\n)*another"):
        awaited([server.url for server in servers])


@pytest.mark.parametrize("reply", [None, 403])
def test_a_proxy_that_is_in_the_way_is_told_with_the_way_past_it(
    servers: list[ScriptedServer], monkeypatch: pytest.MonkeyPatch, reply: int | None
) -> None:
    """Whether nobody listens there, or it refuses."""
    proxy = "http://127.0.0.1:9" if reply is None else servers[0].url
    servers[0].script = [reply]
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    with pytest.raises(UserError, match=f"through the proxy {proxy}.* name its host in no_proxy"):
        awaited("http://search.example:8000")
    assert awaited(servers[1].url).fingerprint == FakeEngine().fingerprint
