"""Cold-start synthesis over four passages, with a word-overlap retriever and a local rewriting server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import (
    ColdStartResult,
    read_trajectories,
    supervised_examples,
    synthesise,
    write_trajectories,
)
from pipeline.core.data.rewriter import RewriteError, Rewriter
from pipeline.core.data.supervision import GoldStep, Unusable, best_sentence, gold_steps
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question, StopReason
from pipeline.core.renderer import Renderer
from pipeline.core.sentences import split_sentences
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

CORPUS = {
    "harp": Passage(
        "harp", "Silver Harp", "The Silver Harp is a toy. It is made by Orvane. It was sold in 1990."
    ),
    "orvane": Passage(
        "orvane", "Orvane", "Orvane is a company in Tal. It was founded by Mara Velin in 1984."
    ),
    "tal": Passage("tal", "Tal", "Tal is a city by the sea. Orvane and Brask are there."),
    "brask": Passage("brask", "Brask", "Brask is a company. Its founder was J. Oll."),
}
HOPS = (
    Hop("Which company makes the Silver Harp?", "Orvane", "The Silver Harp is made by Orvane.", "harp"),
    Hop("Who founded Orvane?", "Mara Velin", "Orvane was founded by Mara Velin.", "orvane"),
)
QUESTION = Question(
    id="q1",
    text="Who founded the maker of the Silver Harp?",
    answers=("Mara Velin", "M. Velin"),
    supporting_ids=("harp", "orvane"),
    decomposition=HOPS,
)


async def by_overlap(query: str, k: int) -> list[Hit]:
    words = set(query.lower().strip("?").split())
    scored = [Hit(p, float(len(words & set(p.text.lower().split())))) for p in CORPUS.values()]
    return sorted(scored, key=lambda hit: -hit.score)[:k]


async def always_wrong(query: str, k: int) -> list[Hit]:
    return [Hit(CORPUS[id_], 1.0) for id_ in ("tal", "brask")][:k]


def synthesised(
    tokenizer: Any,
    *questions: Question,
    retrieve: Any = by_overlap,
    seed: int = 0,
    max_length: int = 4096,
    rewriter: Any = None,
    **config: Any,
) -> tuple[ColdStartResult, Renderer]:
    renderer = Renderer(tokenizer, AgentConfig(**{"documents": 2, **config}))
    run = synthesise(
        questions,
        renderer,
        retrieve,
        CORPUS.get,
        max_length=max_length,
        seed=seed,
        rewriter=rewriter,
    )
    return asyncio.run(run), renderer


def test_a_decomposed_question_becomes_the_trajectory_of_a_perfect_agent(tokenizer: Any) -> None:
    result, renderer = synthesised(tokenizer, QUESTION)
    (trajectory,) = result.trajectories
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert renderer.decode(trajectory.token_ids.tolist()).startswith(
        "Question: Who founded the maker of the Silver Harp?\n"
        "<think> Which company makes the Silver Harp? </think>\n<search>\n[1] "
    )
    assert renderer.decode(trajectory.token_ids[trajectory.loss_mask].tolist()) == (
        "<think> Which company makes the Silver Harp? </think>"
        "<record> The Silver Harp is made by Orvane. </record>\n<think> Who founded Orvane? </think>"
        "<record> Orvane was founded by Mara Velin. </record>\n<answer> Mara Velin </answer>"
    )
    assert not np.isnan(trajectory.logprobs[trajectory.loss_mask]).any()
    for step, hop in zip(trajectory.steps, HOPS, strict=True):
        assert hop.supporting_id in {hit.passage.id for hit in step.hits}
    assert result.skipped.total() == 0
    assert result.searches == 2


SWITCHES = [(t, s, r) for t in (True, False) for s in (True, False) for r in (True, False)]


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize(("think", "search", "record"), SWITCHES)
def test_every_variant_of_the_agent_has_its_cold_start(
    chat_tokenizer: Any, layout: str, think: bool, search: bool, record: bool
) -> None:
    result, renderer = synthesised(
        chat_tokenizer, QUESTION, layout=layout, think=think, search=search, record=record
    )
    assert result.skipped.total() == 0
    (trajectory,) = result.trajectories
    own = renderer.decode(trajectory.token_ids[trajectory.loss_mask].tolist())
    assert trajectory.answer == "Mara Velin"
    assert own.count("<think>") == (2 if think else 0)
    assert own.count("<record>") == (record * (2 if think else 1 if search else 0))
    assert trajectory.num_searches == (search * (2 if think else 1))
    if search and not think:
        assert {hit.passage.id for hit in trajectory.steps[0].hits} == {"harp", "orvane"}


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("record", [True, False])
def test_a_perfect_agent_selects_the_gold_passages_first(
    chat_tokenizer: Any, layout: str, think: bool, record: bool
) -> None:
    config = {"layout": layout, "think": think, "record": record, "select": True, "documents": 3}
    firsts = set()
    for seed in range(8):
        result, renderer = synthesised(chat_tokenizer, QUESTION, retrieve=always_wrong, seed=seed, **config)
        (trajectory,) = result.trajectories
        gold = [["harp"], ["orvane"]] if think else [["harp", "orvane"]]
        for step, wanted in zip(trajectory.steps, gold, strict=True):
            named = [hit.passage.id for hit in step.used_hits]
            assert named[: len(wanted)] == wanted
            assert len(named) == len(set(named)) == 2
            firsts.add(step.selected[0])
        own = renderer.decode(trajectory.token_ids[trajectory.loss_mask].tolist())
        assert own.count("<select>") == own.count("</select>") == len(gold)
        assert own.count("<record>") == record * len(gold)
    assert len(firsts) > 1  # the gold passage is not always in the same place


def test_a_selection_of_one_is_the_gold_passage_by_its_number_as_shown(tokenizer: Any) -> None:
    result, renderer = synthesised(tokenizer, QUESTION, select=True, selected_documents=1)
    text = renderer.decode(result.trajectories[0].token_ids.tolist())
    titles = {"Which company makes the Silver Harp?": "Silver Harp", "Who founded Orvane?": "Orvane"}
    for query, title in titles.items():
        behind = text.partition(f"<think> {query} </think>")[2]
        number = behind.partition("<select> [")[2].partition("]")[0]
        assert f"\n[{number}] {title}: " in behind.partition("</search>")[0]


def test_without_search_a_perfect_agent_selects_nothing(tokenizer: Any) -> None:
    agent = AgentConfig(documents=2, select=True).model_copy(update={"search": False})
    run = synthesise([QUESTION], Renderer(tokenizer, agent), by_overlap, CORPUS.get, max_length=4096, seed=0)
    (trajectory,) = asyncio.run(run).trajectories
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert all(step.selected == () for step in trajectory.steps)


def test_a_perfect_agent_calls_actions_as_these_demonstrate_it(tokenizer: Any) -> None:
    echo = "tests.pipeline.core.agents.test_actions:Echo"
    result, renderer = synthesised(tokenizer, QUESTION, select=True, selected_documents=1, actions=(echo,))
    (trajectory,) = result.trajectories
    assert [(step.action, step.query) for step in trajectory.steps[2:]] == [
        ("echo", "Who"),
        ("echo", "again"),
    ]
    own = renderer.decode(trajectory.token_ids[trajectory.loss_mask].tolist())
    assert own.endswith(
        "<record> Orvane was founded by Mara Velin. </record>\n<echo> Who </echo><echo> again </echo>"
        "<answer> Mara Velin </answer>"
    )
    assert own.count("<select>") == 2


def test_a_missed_gold_passage_replaces_the_last_hit_at_a_random_rank_and_is_counted(tokenizer: Any) -> None:
    ranks = set()
    for seed in range(20):
        result, _ = synthesised(tokenizer, QUESTION, retrieve=always_wrong, seed=seed)
        assert result.inserted == 2
        for step, gold in zip(result.trajectories[0].steps, ("harp", "orvane"), strict=True):
            shown = [hit.passage.id for hit in step.hits]
            assert sorted(shown) == sorted([gold, "tal"])
            ranks.add(shown.index(gold))
    assert ranks == {0, 1}
    hits = [hit for step in result.trajectories[0].steps for hit in step.hits]
    assert all(np.isfinite(hit.score) for hit in hits)


def test_the_same_seed_gives_the_same_trajectories_whatever_the_company(tokenizer: Any) -> None:
    other = Question("q2", "Where is Orvane?", ("Tal",), supporting_ids=("tal",))
    alone, _ = synthesised(tokenizer, QUESTION, retrieve=always_wrong, seed=3)
    together, _ = synthesised(tokenizer, other, QUESTION, retrieve=always_wrong, seed=3)
    assert [t.question_id for t in together.trajectories] == ["q2", "q1"]
    assert together.trajectories[1].token_ids.tolist() == alone.trajectories[0].token_ids.tolist()


def test_questions_that_cannot_be_used_are_skipped_and_counted_by_reason(tokenizer: Any) -> None:
    bare = Question("bare", "Who?", ("Ada",))
    lost = Question("lost", "Who?", ("Ada",), supporting_ids=("nowhere",))
    tagged = Question(
        "tagged",
        "Who?",
        ("Ada",),
        supporting_ids=("harp",),
        decomposition=(Hop("Who?", "Ada", "See </record> there."),),
    )
    deep = Question("deep", "Who?", ("Ada",), supporting_ids=("harp",), decomposition=HOPS * 3)
    result, _ = synthesised(tokenizer, bare, QUESTION, lost, deep, tagged)
    assert [t.question_id for t in result.trajectories] == ["q1"]
    assert result.skipped == {
        "no supporting passages": 1,
        "supporting passage not in the corpus": 1,
        "more steps than agent.max_searches": 1,
        "agent stopped: malformed": 1,
    }


@pytest.mark.parametrize("limits", [{"max_length": 60}, {"max_length": 150}, {"max_turn_tokens": 6}])
def test_questions_that_do_not_fit_are_skipped_and_counted(tokenizer: Any, limits: dict[str, int]) -> None:
    result, _ = synthesised(tokenizer, QUESTION, **{"max_turn_tokens": 40, **limits})
    assert result.trajectories == []
    assert result.skipped == {"agent stopped: length_limit": 1}


def test_a_retriever_that_fails_ends_the_synthesis(tokenizer: Any) -> None:
    async def unavailable(query: str, k: int) -> list[Hit]:
        raise RetrieverUnavailable("down")

    with pytest.raises(RuntimeError, match=r"question .* failed: down"):
        synthesised(tokenizer, QUESTION, retrieve=unavailable)


def test_an_answer_that_makes_no_sense_costs_its_question(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def odd(query: str, k: int) -> list[Hit]:
        if query == HOPS[0].question:
            raise RetrieverError("a passage has neither title nor text")
        return await by_overlap(query, k)

    other = Question("q2", "Who?", ("Mara Velin",), supporting_ids=("orvane",), decomposition=HOPS[1:])
    result, _ = synthesised(tokenizer, QUESTION, other, retrieve=odd)
    assert [t.question_id for t in result.trajectories] == ["q2"]
    assert result.skipped == {"agent stopped: retriever_bad_answer": 1}
    assert "skips question q1: a passage has neither title nor text" in caplog.text


def test_cold_start_examples_weigh_one_and_end_with_the_gold_answer(tokenizer: Any) -> None:
    result, renderer = synthesised(tokenizer, QUESTION)
    (example,) = supervised_examples(result.trajectories, [QUESTION], renderer)
    assert example.number("log_weight") == 0.0
    assert renderer.decode(example.token_ids.tolist()).endswith("<answer> Mara Velin </answer>")
    with pytest.raises(ValueError, match="unknown questions"):
        supervised_examples(result.trajectories, [], renderer)


def test_special_tokens_that_evidence_quotes_stay_text(chat_tokenizer: Any) -> None:
    hop = Hop("What ends a turn?", "<|im_end|>", "A turn ends with <|im_end|> there.", "harp")
    question = Question("q", "What?", ("<|im_end|>",), supporting_ids=("harp",), decomposition=(hop,))
    result, renderer = synthesised(chat_tokenizer, question)
    (trajectory,) = result.trajectories
    assert not set(trajectory.token_ids.tolist()) & set(chat_tokenizer.all_special_ids)
    assert "ends with <|im_end|> there" in renderer.decode(trajectory.token_ids.tolist())


# Supervision of the public data sets.


def steps_of(question: Question, shown: Callable[[Passage], str] = lambda p: p.text) -> list[GoldStep]:
    return gold_steps(question, CORPUS.get, shown)


def test_without_evidence_the_sentence_that_states_the_answer_is_taken() -> None:
    hops = (Hop("maker of Silver Harp", "Orvane"), Hop("Who founded Orvane?", "Mara Velin"))
    # As in MuSiQue: supporting passages in any order, not assigned to hops.
    question = Question(
        "q", QUESTION.text, ("Mara Velin",), supporting_ids=("orvane", "harp"), decomposition=hops
    )
    assert [(s.query, s.evidence, s.passage.id) for s in steps_of(question)] == [
        ("maker of Silver Harp", "Silver Harp: It is made by Orvane.", "harp"),
        ("Who founded Orvane?", "Orvane: It was founded by Mara Velin in 1984.", "orvane"),
    ]


def test_an_answer_that_no_sentence_states_is_recorded_with_its_sub_query() -> None:
    hops = (Hop("Which sea is Tal at?", "North Sea"), Hop("depth of North Sea", "95 m"))
    question = Question("q", "How deep?", ("95 m",), supporting_ids=("tal",), decomposition=hops)
    assert [step.evidence for step in steps_of(question)] == [
        "Which sea is Tal at? North Sea",
        "depth of North Sea: 95 m",
    ]


def test_supporting_passages_alone_make_a_path_from_the_named_one_to_the_answer() -> None:
    question = Question("q", QUESTION.text, ("Mara Velin",), supporting_ids=("orvane", "harp"))
    assert [(s.query, s.evidence) for s in steps_of(question)] == [
        ("Silver Harp", "Silver Harp: It is made by Orvane."),
        ("Orvane", "Orvane: It was founded by Mara Velin in 1984."),
    ]


def test_a_single_supporting_passage_is_searched_with_the_question() -> None:
    question = Question("q", "When was Orvane founded?", ("1984",), supporting_ids=("orvane",))
    (step,) = steps_of(question)
    assert (step.query, step.answer) == ("When was Orvane founded?", "1984")
    assert step.evidence == "Orvane: It was founded by Mara Velin in 1984."


def test_evidence_is_only_taken_from_what_the_agent_can_see() -> None:
    question = Question("q", "When was Orvane founded?", ("1984",), supporting_ids=("orvane",))
    (step,) = steps_of(question, lambda passage: passage.text[:27])
    assert step.evidence == "Orvane is a company in Tal."


def test_a_question_without_supervision_is_unusable() -> None:
    with pytest.raises(Unusable, match="no supporting passages"):
        steps_of(Question("q", "Who?", ("Ada",), decomposition=(Hop("Who?", "Ada"),)))


def test_sentences_end_where_sentences_end() -> None:
    text = 'Dr. Oll met J. Smith in St. Louis. "Why?" he asked. It was 3.5 km away, e.g. far! Yes.'
    assert split_sentences(text) == [
        "Dr. Oll met J. Smith in St. Louis.",
        '"Why?" he asked.',
        "It was 3.5 km away, e.g. far!",
        "Yes.",
    ]
    assert best_sentence(Passage("p", "", ""), "", "x", "y") == ""


# Files.


def test_trajectories_are_read_back_for_the_same_protocol_only(tmp_path: Path, tokenizer: Any) -> None:
    result, renderer = synthesised(tokenizer, QUESTION)
    path = tmp_path / "cold_start" / "trajectories.parquet"
    write_trajectories(path, result.trajectories, renderer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (copy,) = read_trajectories(path, renderer)
    assert copy.token_ids.tolist() == result.trajectories[0].token_ids.tolist()
    assert copy.steps == result.trajectories[0].steps
    for agent in (
        AgentConfig(instructions="Be brief."),
        AgentConfig(documents=2, select=True),
        AgentConfig(documents=2, actions=("tests.pipeline.core.agents.test_actions:Echo",)),
    ):
        with pytest.raises(UserError, match="another tokenizer or other agent"):
            read_trajectories(path, Renderer(tokenizer, agent))


def test_files_that_hold_no_trajectories_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, AgentConfig())
    with pytest.raises(UserError, match="no trajectory file"):
        read_trajectories(tmp_path / "missing.parquet", renderer)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_trajectories(tmp_path / "text.parquet", renderer)
    write_trajectories(tmp_path / "empty.parquet", [], renderer)
    with pytest.raises(UserError, match="holds no trajectories"):
        read_trajectories(tmp_path / "empty.parquet", renderer)


# Rewriting.

Reply = tuple[int, str]


class ChatServer:
    """An OpenAI-compatible endpoint on this machine: gives the (status, content) replies in turn."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                    reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                time.sleep(0.01)  # long enough for requests to overlap
                content = json.dumps({"choices": [{"message": {"content": reply[1]}}]}).encode()
                with lock:
                    server.running -= 1
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    servers: list[ChatServer] = []

    def start(*replies: Reply) -> ChatServer:
        server = ChatServer(replies)
        servers.append(server)
        threading.Thread(target=server.http.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


BETTER = [
    {"query": "Who makes it?", "evidence": "Orvane makes the Silver Harp."},
    {"query": "Who began Orvane?", "evidence": "Mara Velin began Orvane."},
]
GOOD = (200, "Here you are: " + json.dumps(BETTER))


def rewriting(
    tokenizer: Any, url: str, cache: Path, *questions: Question, max_attempts: int = 3
) -> ColdStartResult:
    async def run() -> ColdStartResult:
        renderer = Renderer(tokenizer, AgentConfig(documents=2))
        rewriter = Rewriter(url, "writer", cache, concurrency=2, max_attempts=max_attempts, backoff_s=0.001)
        async with rewriter:
            return await synthesise(
                questions, renderer, by_overlap, CORPUS.get, max_length=4096, seed=0, rewriter=rewriter
            )

    return asyncio.run(run())


def test_rewritten_steps_keep_their_passages_and_are_asked_for_once(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(GOOD)
    cache = tmp_path / "cache.jsonl"
    for _ in range(2):
        (trajectory,) = rewriting(tokenizer, server.url, cache, QUESTION).trajectories
        assert [step.query for step in trajectory.steps] == ["Who makes it?", "Who began Orvane?"]
        assert trajectory.steps[1].record == "Mara Velin began Orvane."
        assert "harp" in {hit.passage.id for hit in trajectory.steps[0].hits}
    (request,) = server.requests
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert request["model"] == "writer"
    assert "Silver Harp" in request["messages"][1]["content"]
    assert "secret" not in cache.read_text()


def test_a_kept_answer_that_is_damaged_is_asked_for_again(tokenizer: Any, serve: Any, tmp_path: Path) -> None:
    server, cache = serve(GOOD), tmp_path / "cache.jsonl"
    rewriting(tokenizer, server.url, cache, QUESTION)
    row = json.loads(cache.read_text())
    for content in ("[{", "[" * 200_000, 7):
        cache.write_text(json.dumps(row | {"content": content}) + "\n")
        asked = len(server.requests)
        assert len(rewriting(tokenizer, server.url, cache, QUESTION).trajectories) == 1
        assert len(server.requests) == asked + 1


def test_a_cache_line_that_a_kill_cut_off_is_asked_for_again(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    server, cache = serve(GOOD), tmp_path / "cache.jsonl"
    cache.write_text('{"key": "abc", "con')
    rewriting(tokenizer, server.url, cache, QUESTION)
    rewriting(tokenizer, server.url, cache, QUESTION)
    assert len(server.requests) == 1


def test_passing_failures_are_retried(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    lost_answer = [BETTER[0], {"query": "Who?", "evidence": "Somebody began Orvane."}]
    server = serve((503, ""), (200, json.dumps(lost_answer)), GOOD)
    assert len(rewriting(tokenizer, server.url, tmp_path / "c.jsonl", QUESTION).trajectories) == 1
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "content",
    ["Sorry.", "[]", '[{"query": "q"}, {"query": "q"}]', json.dumps([{"query": "", "evidence": "e"}] * 2)],
)
def test_a_question_that_the_endpoint_cannot_rewrite_is_skipped_and_counted(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer], content: str
) -> None:
    server = serve((200, content))
    result = rewriting(tokenizer, server.url, tmp_path / "c.jsonl", QUESTION)
    assert result.skipped == {"endpoint gave no usable rewriting": 1}
    assert len(server.requests) == 3


def test_an_endpoint_that_keeps_failing_ends_the_synthesis(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    failing = serve((500, ""))
    with pytest.raises(RewriteError, match="500"):
        rewriting(tokenizer, failing.url, tmp_path / "c.jsonl", QUESTION)
    assert len(failing.requests) == 3
    refusing = serve((401, ""))
    with pytest.raises(RewriteError, match="401"):
        rewriting(tokenizer, refusing.url, tmp_path / "c.jsonl", QUESTION)
    assert len(refusing.requests) == 1
    with pytest.raises(RewriteError, match="ConnectError"):
        rewriting(tokenizer, "http://127.0.0.1:9/v1", tmp_path / "c.jsonl", QUESTION)


def test_requests_in_flight_are_bounded(
    tmp_path: Path, tokenizer: Any, serve: Callable[..., ChatServer]
) -> None:
    server = serve(GOOD)
    questions = [
        Question(str(n), f"{QUESTION.text} {n}", QUESTION.answers, "", 2, QUESTION.supporting_ids, HOPS)
        for n in range(12)
    ]
    assert len(rewriting(tokenizer, server.url, tmp_path / "c.jsonl", *questions).trajectories) == 12
    assert server.most_running <= 2
