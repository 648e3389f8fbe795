"""Where cold-start examples come from. The retriever is a list of passages; nothing else is faked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from pipeline.core.config import Config
from pipeline.core.config.loading import load_config
from pipeline.core.data.cold_start import write_trajectories
from pipeline.core.data.cold_start_source import ColdStartMaker
from pipeline.core.data.questions import read_questions
from pipeline.core.errors import UserError
from pipeline.core.records import Example, Question
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import Servers
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit
from tests.retriever_service.support import load_hash_encoder, write_jsonl

PASSAGES = [Passage(f"p{i}", f"Maker {i}", f"Maker {i} was founded by Ada {i}.") for i in range(6)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Only its passages are looked at."""
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    corpus = write_jsonl(tmp_path / "index-corpus.jsonl", rows)
    build_index([corpus], tmp_path / "index", EncoderSpec("hash"), workers=1, load_encoder=load_hash_encoder)
    return tmp_path / "index"


def write_questions(path: Path, numbers: Sequence[int], prefix: str = "q", *, gold: bool = True) -> Path:
    rows = []
    for i in numbers:
        hop = {
            "question": f"Who founded Maker {i}?",
            "answer": f"Ada {i}",
            "evidence": f"Maker {i} was founded by Ada {i}.",
            "supporting_id": f"p{i}",
        }
        row = {"id": f"{prefix}{i}", "question": f"Who founded Maker {i}?", "answers": [f"Ada {i}"]}
        rows.append(row | ({"decomposition": [hop]} if gold else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def retrieve(query: str, k: int) -> list[Hit]:
    """Finds the first passages, whatever the query."""
    return [Hit(passage, 1.0 - 0.1 * rank) for rank, passage in enumerate(PASSAGES[:k])]


def config(tmp_path: Path, *overrides: str) -> Config:
    fixed = (f"data.root={tmp_path}", "data.train=train.jsonl", "agent.documents=2", "cold_start.questions=3")
    return load_config(None, [*fixed, *overrides])


def maker(config: Config, tokenizer: Any) -> ColdStartMaker:
    renderer, max_length = Renderer(tokenizer, config.agent), config.model.max_length
    return ColdStartMaker(config.cold_start, config.data, config.retriever, renderer, max_length, config.seed)


class Make(Protocol):
    def __call__(
        self, config: Config, train: Sequence[Question] | None = None
    ) -> tuple[list[Example], dict[str, Any]]: ...


@pytest.fixture
def made(index: Path, tokenizer: Any) -> Make:
    """Examples and statistics of a configuration; `train` in place of all its training questions."""

    def make(config: Config, train: Sequence[Question] | None = None) -> tuple[list[Example], dict[str, Any]]:
        if train is None:
            train = read_questions(config.data.train, root=config.data.root)
        making, cache = maker(config, tokenizer), index.with_name("cache.jsonl")
        return asyncio.run(making.examples(making.source(train), retrieve, index, cache))

    return make


def question_of(example: Example) -> str:
    return example.id.split("/")[0]


def text(config: Config, tokenizer: Any, example: Example) -> str:
    return Renderer(tokenizer, config.agent).decode(example.token_ids.tolist())


def test_training_questions_become_examples_of_weight_one(tmp_path: Path, made: Make, tokenizer: Any) -> None:
    write_questions(tmp_path / "train.jsonl", range(3))
    settings = config(tmp_path)
    examples, statistics = made(settings)
    assert [(question_of(e), e.number("log_weight")) for e in examples] == [
        ("q0", 0.0),
        ("q1", 0.0),
        ("q2", 0.0),
    ]
    # Two of the three gold passages are always found; the third has to be put among the hits.
    assert statistics == {"trajectories": 3, "skipped": {}, "searches": 3, "gold_passages_inserted": 1}
    for number, example in enumerate(examples):
        written = text(settings, tokenizer, example)
        assert f"Maker {number}: Maker {number} was founded by Ada {number}." in written
        assert written.endswith(f"<answer> Ada {number} </answer>")


def test_the_same_questions_and_seed_give_the_same_examples(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    first, _ = made(config(tmp_path))
    again, _ = made(config(tmp_path))
    assert [e.token_ids.tolist() for e in first] == [e.token_ids.tolist() for e in again]


def test_cold_start_questions_may_come_from_files_of_their_own(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    write_questions(tmp_path / "gold.jsonl", range(6), prefix="g")
    examples, _ = made(config(tmp_path, "cold_start.sources=gold.jsonl"))
    assert len(examples) == 3
    assert all(question_of(e).startswith("g") for e in examples)


def test_questions_without_supervision_do_not_count(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "a.jsonl", range(6), prefix="bare", gold=False)
    write_questions(tmp_path / "b.jsonl", range(3))
    examples, statistics = made(config(tmp_path, "data.train=[a.jsonl, b.jsonl]"))
    assert [question_of(e) for e in examples] == ["q0", "q1", "q2"]
    assert statistics["skipped"] == {}


def test_the_questions_are_a_sample_over_all_files(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "a.jsonl", range(6))
    write_questions(tmp_path / "b.jsonl", range(6), prefix="r")
    settings = ["data.train=[a.jsonl, b.jsonl]", "cold_start.questions=4"]
    samples = [
        {question_of(e) for e in made(config(tmp_path, *settings, f"seed={seed}"))[0]} for seed in range(6)
    ]
    assert all(len(sample) == 4 for sample in samples)
    assert {id_[0] for id_ in set().union(*samples)} == {"q", "r"}
    assert len({frozenset(sample) for sample in samples}) > 1


def test_the_data_seed_chooses_the_questions_whatever_the_seed_of_the_run(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))

    def sample(*seeds: str) -> list[str]:
        return [question_of(e) for e in made(config(tmp_path, *seeds))[0]]

    assert sample("data.seed=5", "seed=1") == sample("data.seed=5", "seed=2") == sample("seed=5")
    assert len({tuple(sample(f"data.seed={seed}")) for seed in range(6)}) > 1


def test_a_gold_passage_that_the_corpus_lacks_is_counted(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", [0, 9])
    examples, statistics = made(config(tmp_path))
    assert [question_of(e) for e in examples] == ["q0"]
    assert sum(statistics["skipped"].values()) == 1


def test_a_cold_start_without_any_supervision_is_refused(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", range(6), gold=False)
    with pytest.raises(UserError) as caught:
        made(config(tmp_path))
    message = str(caught.value)
    assert "cold_start.questions is 3, but none of 6 questions" in message
    assert "cold_start.questions=0" in message


# ---------------------------------------------------------------- a server in place of the index


SERVER = "retriever.url=http://127.0.0.1:1"


def served(tmp_path: Path, tokenizer: Any, *overrides: str) -> tuple[list[Example], dict[str, Any]]:
    """Examples whose retriever is a server."""
    settings = config(tmp_path, SERVER, *overrides)
    making = maker(settings, tokenizer)
    train = read_questions(settings.data.train, root=settings.data.root)
    cache, servers = tmp_path / "cache.jsonl", Servers((), "fingerprint")
    return asyncio.run(making.examples(making.source(train), retrieve, servers, cache))


def test_gold_passages_of_a_server_are_those_of_the_corpus(
    tmp_path: Path, index: Path, made: Make, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(3))
    examples, statistics = served(tmp_path, tokenizer, "data.corpus=index-corpus.jsonl")
    expected, same_statistics = made(config(tmp_path))
    assert [e.token_ids.tolist() for e in examples] == [e.token_ids.tolist() for e in expected]
    assert statistics == same_statistics


def test_a_server_without_a_corpus_beside_it_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_questions(tmp_path / "train.jsonl", range(3))
    with pytest.raises(UserError, match=r"cannot give passages by id: set data\.corpus"):
        served(tmp_path, tokenizer)


def test_each_source_of_gold_passages_is_looked_at_before_anything_starts(
    tmp_path: Path, index: Path, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(3))
    with pytest.raises(RetrieverError, match=r"missing\.jsonl does not exist"):
        served(tmp_path, tokenizer, "data.corpus=[index-corpus.jsonl, missing.jsonl]")


def test_ready_trajectories_need_no_corpus_beside_the_server(
    tmp_path: Path, index: Path, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    path = ready(config(tmp_path), index, tokenizer, tmp_path / "cold_start.parquet")
    assert len(served(tmp_path, tokenizer, f"cold_start.trajectories={path}")[0]) == 3


# ---------------------------------------------------------------- ready trajectories


def ready(settings: Config, index: Path, tokenizer: Any, path: Path) -> Path:
    """What `exsearch cold-start` writes with these settings."""
    making = maker(settings, tokenizer)
    questions = making.questions(read_questions(settings.data.train, root=settings.data.root))
    result = asyncio.run(making.synthesise(questions, retrieve, index, index.with_name("cache.jsonl")))
    write_trajectories(path, result.trajectories, making.renderer)
    return path


@pytest.mark.parametrize("sources", [(), ("cold_start.sources=gold.jsonl",)])
def test_ready_trajectories_give_the_same_examples_as_synthesising_them(
    tmp_path: Path, index: Path, made: Make, tokenizer: Any, sources: tuple[str, ...]
) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    write_questions(tmp_path / "gold.jsonl", range(6), prefix="g")
    synthesised, _ = made(config(tmp_path, *sources))
    path = ready(config(tmp_path, *sources), index, tokenizer, tmp_path / "cold_start.parquet")
    examples, statistics = made(config(tmp_path, *sources, f"cold_start.trajectories={path}"))
    assert [(question_of(e), e.token_ids.tolist()) for e in examples] == [
        (question_of(e), e.token_ids.tolist()) for e in synthesised
    ]
    assert statistics == {"trajectories": 3}


def test_ready_trajectories_of_questions_outside_of_the_training_sample_are_used(
    tmp_path: Path, index: Path, made: Make, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    path = ready(config(tmp_path), index, tokenizer, tmp_path / "cold_start.parquet")
    settings = config(tmp_path, f"cold_start.trajectories={path}", "data.train_limit=1")
    sample = read_questions(settings.data.train, root=settings.data.root, limit=1)
    assert len(made(settings, sample)[0]) == 3


def test_ready_trajectories_of_unknown_questions_are_refused(
    tmp_path: Path, index: Path, made: Make, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    write_questions(tmp_path / "gold.jsonl", range(6), prefix="g")
    path = ready(
        config(tmp_path, "cold_start.sources=gold.jsonl"), index, tokenizer, tmp_path / "cold_start.parquet"
    )
    with pytest.raises(
        UserError, match=r"3 questions that are neither in data\.train nor in cold_start\.sources \(g"
    ):
        made(config(tmp_path, f"cold_start.trajectories={path}"))


def test_ready_trajectories_of_other_agent_settings_are_refused(
    tmp_path: Path, index: Path, made: Make, tokenizer: Any
) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    path = ready(config(tmp_path), index, tokenizer, tmp_path / "cold_start.parquet")
    with pytest.raises(UserError, match="another tokenizer or other agent"):
        made(config(tmp_path, f"cold_start.trajectories={path}", "agent.record=false"))


def test_a_missing_trajectory_file_is_refused(tmp_path: Path, made: Make) -> None:
    write_questions(tmp_path / "train.jsonl", range(6))
    with pytest.raises(UserError, match=r"no trajectory file .*nothing\.parquet"):
        made(config(tmp_path, f"cold_start.trajectories={tmp_path / 'nothing.parquet'}"))
