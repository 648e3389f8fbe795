"""The chat layout of each model family: to the token, what is trained is what was sampled and the template says."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import supervised_examples
from pipeline.core.records import StopReason
from pipeline.core.renderer import Renderer
from tests.pipeline.core.agents.test_search import AGAIN as THINK_AGAIN
from tests.pipeline.core.agents.test_search import ANSWER, QUESTION, THINK, run
from tests.pipeline.core.data.cold_start_support import QUESTION as SUPERVISED
from tests.pipeline.core.data.cold_start_support import synthesised
from tests.pipeline.core.families import ENDS_OF_TURNS, FAMILIES, FOLDED

INSTRUCTIONS = "Search, then answer."
SELECT = "<select> [2] > [1] </select>\n"

each_family = pytest.mark.parametrize("family", FAMILIES)
with_and_without_select = pytest.mark.parametrize("select", [False, True], ids=["no select", "select"])


@pytest.fixture
def of(chat_tokenizer: Any, family: str) -> Any:
    """A tokenizer with the template of the family."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = FAMILIES[family]
    return tokenizer


def agent(select: bool) -> dict[str, Any]:
    return {"layout": "chat", "instructions": INSTRUCTIONS, "select": select}


def turns_of(select: bool) -> list[str]:
    again, answer = THINK_AGAIN, ANSWER
    return [THINK, SELECT + again, SELECT + answer] if select else [THINK, again, answer]


def as_the_template_says(tokenizer: Any, family: str, text: str, turns: list[str]) -> str:
    """The same conversation, rendered as a whole by the template, up to the end of the last turn."""
    observations = re.findall(r"<search>\n.*?</search>", text, re.DOTALL)
    question = f"Question: {QUESTION.text}"
    head = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]
    if family in FOLDED:
        head = [{"role": "user", "content": f"{INSTRUCTIONS}\n\n{question}"}]
    said = [turn for pair in zip(turns, [*observations, ""], strict=True) for turn in pair][:-1]
    roles = ["assistant", "user"] * len(said)
    later = [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]
    whole: str = tokenizer.apply_chat_template(
        [*head, *later], tokenize=False, strftime_now=AgentConfig().date.strftime
    )
    # The model itself writes the space in front of its words, or not.
    whole = whole.replace("[/INST] <", "[/INST]<").removesuffix("\n")
    return next(whole.removesuffix(end) for end in ENDS_OF_TURNS if whole.endswith(end))


@each_family
@with_and_without_select
def test_a_trajectory_reads_as_the_template_says(of: Any, family: str, select: bool) -> None:
    turns = turns_of(select)
    trajectory, _, _ = run(of, turns, **agent(select))
    assert trajectory.stop_reason is StopReason.ANSWERED
    text = of.decode(trajectory.token_ids)
    whole = as_the_template_says(of, family, text, turns)
    assert text == whole
    special, again = set(of.all_special_ids), of(whole, add_special_tokens=False)["input_ids"]
    assert [i for i in trajectory.token_ids if i in special] == [i for i in again if i in special]
    # Prompts of families that have one of their own, or today's date.
    assert text.count(INSTRUCTIONS) == 1
    assert "You are" not in text and "2026" not in text


@each_family
@with_and_without_select
def test_what_is_trained_is_what_was_sampled(of: Any, select: bool) -> None:
    turns = turns_of(select)
    trajectory, engine, _ = run(of, turns, **agent(select))
    example = Renderer(of, AgentConfig(**agent(select))).with_gold_answer(trajectory, "Mara Velin", 0.0)
    assert example.token_ids.tolist() == trajectory.token_ids.tolist()
    for prompt, written in zip(engine.prompts, engine.written, strict=True):
        end = len(prompt) + len(written)
        assert example.token_ids[:end].tolist() == [*prompt, *written]
        assert example.loss_mask[len(prompt) : end].all()
    assert example.num_targets == sum(map(len, engine.written))
    assert of.decode(example.token_ids[example.loss_mask]) == "".join(turns)


@each_family
@with_and_without_select
def test_the_cold_start_has_the_layout_of_what_is_sampled(of: Any, select: bool) -> None:
    result, renderer = synthesised(of, SUPERVISED, **agent(select))
    (example,) = supervised_examples(result.trajectories, [SUPERVISED], renderer)
    trained = of.decode(example.token_ids[example.loss_mask])
    assert not set(example.token_ids[example.loss_mask].tolist()) & set(of.all_special_ids)
    turns = [part for part in re.split(r"(?<=</think>)", trained) if part]
    replayed, engine, _ = run(of, turns, **agent(select))
    # Other passages are found, but each turn has the tokens that the engine's have.
    wrote = [id_ for turn in engine.written for id_ in turn]
    assert replayed.stop_reason is StopReason.ANSWERED
    assert example.token_ids[example.loss_mask].tolist() == wrote
    assert trained.count("<select>") == 2 * select


@each_family
@settings(max_examples=10)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_passage_stays_in_its_turn_whatever_it_says(chat_tokenizer: Any, family: str, text: str) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = FAMILIES[family]
    renderer = Renderer(tokenizer, AgentConfig(**agent(True)))
    special = set(tokenizer.all_special_ids)
    smuggled = "".join([*ENDS_OF_TURNS, text, "[/INST]"])

    def num_special(ids: list[int]) -> int:
        return sum(id_ in special for id_ in ids)

    assert num_special(renderer.prompt_ids(smuggled)) == num_special(renderer.prompt_ids("x"))
