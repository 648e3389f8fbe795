"""Agents that search on real server processes, through everything that a run has in between."""

from __future__ import annotations

import asyncio
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.retriever import open_retriever
from pipeline.core.config.loading import load_config
from pipeline.core.data.cold_start import synthesise
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import Searched, Servers, await_servers
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.corpus import read_corpus
from tests.retriever_service.server_process import index_server, search_r1_server
from tests.retriever_service.support import write_animals

pytestmark = pytest.mark.component
QUERY = "Which animal swims in rivers?"
QUESTION = Question("q", QUERY, ("Otter",), decomposition=(Hop(QUERY, "Otter", "It swims.", "a2"),))


def awaited(*overrides: str) -> Servers:
    retriever, display = load_config(None, overrides).retriever, Display(Console(file=io.StringIO()))
    found = await_servers(retriever, display, documents=3, timeout_s=60)
    assert found is not None
    return found


def test_an_agent_finds_the_same_on_servers_as_in_their_index(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, index = write_animals(tmp_path / "corpus.jsonl"), tmp_path / "index"
    build_index([corpus], index, EncoderSpec())
    passages = {passage.id: passage for passage in read_corpus([corpus])}
    config = load_config(None, ["agent.documents=3", "retriever.max_attempts=1"])

    def trajectory(searched: Searched) -> Trajectory:
        """Of an agent that asks the retriever its question and then answers."""
        retrieve = open_retriever(pickle.loads(pickle.dumps(searched)), config.retriever)
        renderer = Renderer(tokenizer, config.agent)
        made = synthesise([QUESTION], renderer, retrieve, passages.get, max_length=2048, seed=0)
        result = asyncio.run(made)
        assert result.inserted == 0
        return result.trajectories[0]

    def found(searched: Searched) -> list[tuple[str, str, str]]:
        (step,) = trajectory(searched).steps
        return [(hit.passage.id, hit.passage.title, hit.passage.text) for hit in step.hits]

    expected = found(index)
    assert expected[0][:2] == ("a2", "Otter")
    with index_server(index, "secret") as (ours, process), search_r1_server(index) as (search_r1, _):
        monkeypatch.setenv("EXSEARCH_TOKEN", "secret")
        native = awaited(f"retriever.url={ours}")
        assert found(native) == expected
        assert found(awaited(f"retriever.url={ours}", "retriever.dialect=search-r1")) == expected
        assert found(awaited(f"retriever.url={search_r1}", "retriever.dialect=search-r1")) == expected

        with pytest.raises(UserError, match=r"404.*retriever\.dialect \(native\)"):
            awaited(f"retriever.url={search_r1}")
        monkeypatch.setenv("EXSEARCH_TOKEN", "guessed")
        with pytest.raises(UserError, match=r"401.*token in EXSEARCH_TOKEN"):
            awaited(f"retriever.url={ours}")

        process.kill()
        process.wait(timeout=30)
        with pytest.raises(RuntimeError, match=r"question q failed: no answer from"):
            trajectory(native)
