"""Cold-start synthesis over four passages, with a word-overlap retriever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import (
    read_trajectories,
    supervised_examples,
    synthesise,
    write_trajectories,
)
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question, StopReason
from pipeline.core.renderer import Renderer
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.hits import Hit
from tests.pipeline.core.data.cold_start_support import CORPUS, HOPS, QUESTION, by_overlap, synthesised


async def always_wrong(query: str, k: int) -> list[Hit]:
    return [Hit(CORPUS[id_], 1.0) for id_ in ("tal", "brask")][:k]


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
