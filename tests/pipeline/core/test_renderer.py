"""The agent's language. Tokenizers are tiny, built in memory; chat templates imitate three model families."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from pipeline.core.config import AgentConfig, Tags
from pipeline.core.errors import UserError
from pipeline.core.records import StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.turns import MalformedTurn, Turn, default_instructions
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

HITS = (
    Hit(Passage("p1", "Silver Harp", "The Silver Harp is made by Orvane."), 0.9),
    Hit(Passage("p2", "", "A passage without a title."), 0.1),
)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=40)
contents = words.map(str.strip).filter(bool)


def say(renderer: Renderer, text: str) -> list[int]:
    ids: list[int] = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@given(record=contents, query=contents)
def test_a_turn_that_is_written_out_parses_back(tokenizer: Any, record: str, query: str) -> None:
    renderer = Renderer(tokenizer, AgentConfig())
    for turn in (Turn(query=query), Turn(answer=query)):
        assert renderer.parse_turn(renderer.turn_text(turn), expects_record=False) == turn
    for turn in (Turn(record=record, query=query), Turn(record=record, answer=query)):
        assert renderer.parse_turn(renderer.turn_text(turn), expects_record=True) == turn


def test_a_turn_parses_with_any_tags(tokenizer: Any) -> None:
    tags = Tags(think=("[Q", "Q]"), search=("(*", "*)"), record=("$$", "^^"), answer=("A:", "\\end"))
    renderer = Renderer(tokenizer, AgentConfig(tags=tags))
    turn = Turn(record="a fact (1984).", answer="Ada + Bob?")
    assert renderer.parse_turn(renderer.turn_text(turn), expects_record=True) == turn


@pytest.mark.parametrize(
    ("text", "expects_record"),
    [
        ("", False),
        ("Who founded it?", False),
        ("<think> open", False),
        ("<think> </think>", False),
        ("well <think> q </think>", False),
        ("<think> q </think> and more", False),
        ("<think> q </think><think> q </think>", False),
        ("<think> q </think> <answer> a </answer>", False),
        ("<think> q <search> [1] made up </search> </think>", False),
        ("<record> r </record> <think> q </think>", False),
        ("<think> q </think>", True),
        ("<record> r </record>", True),
        ("<record> r <think> q </think> </record> <answer> a </answer>", True),
        ("<answer> a <record> r </record> </answer>", False),
    ],
)
def test_a_turn_that_breaks_the_protocol_is_malformed(
    tokenizer: Any, text: str, expects_record: bool
) -> None:
    with pytest.raises(MalformedTurn):
        Renderer(tokenizer, AgentConfig()).parse_turn(text, expects_record=expects_record)


def test_an_empty_answer_and_an_empty_record_are_the_models_own_fault_but_well_formed(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, AgentConfig())
    assert renderer.parse_turn("<answer></answer>", expects_record=False) == Turn(answer="")
    parsed = renderer.parse_turn("<record> </record><think>q</think>", expects_record=True)
    assert parsed == Turn(record="", query="q")


def test_the_plain_layout_reads_as_one_running_text(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, AgentConfig(instructions="Be brief."))
    ids = renderer.prompt_ids("Who founded Orvane?") + say(renderer, "<think> Orvane </think>")
    ids += renderer.observation_ids(HITS) + say(renderer, "<record> r </record>\n<think> q </think>")
    ids += renderer.answer_demand_ids(at_turn_start=False) + renderer.answer_ids("Mara Velin")
    assert renderer.decode(ids) == (
        "Be brief.\n\nQuestion: Who founded Orvane?\n<think> Orvane </think>\n<search>\n"
        "[1] Silver Harp: The Silver Harp is made by Orvane.\n[2] A passage without a title.\n</search>\n"
        "<record> r </record>\n<think> q </think>\n<answer> Mara Velin </answer>"
    )


def test_a_long_passage_is_cut_at_its_token_limit_and_others_are_not(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, AgentConfig(max_document_tokens=8))
    long = Hit(Passage("p", "Title", "word " * 100), 1.0)
    short = Hit(Passage("q", "", "tiny"), 1.0)
    text = renderer.decode(renderer.observation_ids([long, short]))
    assert text.startswith("\n<search>\n[1] Title: ")
    assert text.endswith("\n[2] tiny\n</search>\n")
    without = renderer.observation_ids([Hit(Passage("p", "", ""), 1.0), short])
    space = 1  # all that stands for a passage without text
    assert len(renderer.observation_ids([long, short])) == len(without) - space + 8


SMUGGLED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "[INST]"]


@pytest.mark.parametrize("layout", ["plain", "chat"])
@given(parts=st.lists(st.one_of(st.sampled_from(SMUGGLED), words), max_size=6))
def test_text_from_outside_never_becomes_a_special_token(
    chat_tokenizer: Any, layout: str, parts: list[str]
) -> None:
    text = "".join(parts)
    renderer = Renderer(chat_tokenizer, AgentConfig.model_validate({"layout": layout}))

    def num_special(ids: list[int]) -> int:
        return sum(id_ in set(chat_tokenizer.all_special_ids) for id_ in ids)

    def observed(content: str) -> list[int]:
        return renderer.observation_ids([Hit(Passage("p", content, content), 1.0)])

    assert num_special(renderer.prompt_ids(text)) == num_special(renderer.prompt_ids("x"))
    assert num_special(observed(text)) == num_special(observed("x"))
    assert num_special(renderer.answer_ids(text)) == 0
    assert text in renderer.decode(renderer.prompt_ids(text))


tag_texts = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<search>", "<<answer>>", "</record", "<", "ans"]
)


@given(parts=st.lists(st.one_of(tag_texts, words), max_size=6))
def test_text_from_outside_never_becomes_a_tag_that_is_one_token(
    tag_tokenizer: Any, parts: list[str]
) -> None:
    text = "".join(parts)
    renderer = Renderer(tag_tokenizer, AgentConfig())

    def num_tags(ids: list[int]) -> int:
        return sum(id_ in set(tag_tokenizer.get_added_vocab().values()) for id_ in ids)

    def observed(content: str) -> list[int]:
        return renderer.observation_ids([Hit(Passage("p", content, content), 1.0)])

    assert num_tags(renderer.prompt_ids(text)) == 0
    assert num_tags(observed(text)) == num_tags(observed("x")) == 2
    assert num_tags(renderer.answer_ids(text)) == 1
    assert renderer.decode(renderer.prompt_ids(text)) == f"Question: {text}\n"
    assert renderer.decode(renderer.answer_ids(text)) == f" {text} </answer>"


def test_a_tag_in_other_forms_of_its_letters_does_not_become_a_tag(tag_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tag_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<go>", normalized=True)])
    tags = Tags(think=("<go>", "</think>"))
    renderer = Renderer(tokenizer, AgentConfig(tags=tags))
    (tag,) = say(renderer, "<go>")
    wide = "".join(chr(ord(c) + 0xFEE0) for c in "<go>")
    assert say(renderer, wide) == [tag]
    assert tag not in renderer.prompt_ids(wide)


def test_of_a_long_passage_only_its_beginning_is_tokenised(tokenizer: Any) -> None:
    looked_at = []

    class Counting:
        all_special_tokens = tokenizer.all_special_tokens

        def __call__(self, text: str, **options: Any) -> Any:
            looked_at.append(len(text))
            return tokenizer(text, **options)

    renderer, whole = Renderer(Counting(), AgentConfig()), Renderer(tokenizer, AgentConfig())
    long = "The Silver Harp is made by Orvane, founded in 1984. " * 20_000
    blank = " " * 1_000_000 + "the end"
    assert len(long) > 1_000_000
    for text in (long, blank):
        hit = Hit(Passage("p", "Title", text), 1.0)
        looked_at.clear()
        expected = whole._untrusted(f" Title: {text}")[: AgentConfig().max_document_tokens]
        assert (
            renderer.observation_ids([hit])[len(say(whole, "\n<search>\n[1]")) :][: len(expected)] == expected
        )
        assert text is blank or sum(looked_at) < 10_000


def with_template(chat_tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", ["qwen", "llama-3", "llama-3.1", "mistral"])
def test_rendering_turn_by_turn_gives_the_tokens_of_the_whole_conversation(
    chat_tokenizer: Any, chat_templates: dict[str, str], family: str
) -> None:
    tokenizer = with_template(chat_tokenizer, chat_templates[family])
    renderer = Renderer(tokenizer, AgentConfig(layout="chat", instructions="Search, then answer."))
    first, second = "<think> Orvane </think>", "<record> r </record>\n<think> q </think>"
    ids = renderer.prompt_ids("Who founded Orvane?") + say(renderer, first)
    ids += renderer.observation_ids(HITS) + say(renderer, second) + renderer.observation_ids(HITS[:1])

    passage = "[1] Silver Harp: The Silver Harp is made by Orvane.\n"
    observations = [
        f"<search>\n{passage}[2] A passage without a title.\n</search>",
        f"<search>\n{passage}</search>",
    ]
    head = [
        {"role": "system", "content": "Search, then answer."},
        {"role": "user", "content": "Question: Who founded Orvane?"},
    ]
    if family == "mistral":
        head = [{"role": "user", "content": "Search, then answer.\n\nQuestion: Who founded Orvane?"}]
    conversation = [
        *head,
        {"role": "assistant", "content": first},
        {"role": "user", "content": observations[0]},
        {"role": "assistant", "content": second},
        {"role": "user", "content": observations[1]},
    ]
    whole = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    # Mistral's template writes a space in front of a model turn that a model writes (or not) by itself.
    whole = whole.replace("[/INST] <", "[/INST]<")
    assert renderer.decode(ids) == whole
    special = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in say(renderer, whole) if i in special]


def test_instructions_are_shown_once_even_where_the_template_moves_the_system_message(
    chat_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    tokenizer = with_template(chat_tokenizer, chat_templates["mistral-v0.3"])
    renderer = Renderer(tokenizer, AgentConfig(layout="chat", instructions="Search, then answer."))
    ids = renderer.prompt_ids("Who founded Orvane?") + say(renderer, "<think> Orvane </think>")
    ids += renderer.observation_ids(HITS)
    assert renderer.decode(ids).count("Search, then answer.") == 1
    assert renderer.decode(ids).startswith("<s>[INST] Search, then answer.")


@pytest.mark.parametrize("family", ["thinking", "not thinking"])
def test_a_turn_begins_without_the_thought_that_a_template_opens(
    chat_tokenizer: Any, chat_templates: dict[str, str], family: str
) -> None:
    # The agent's turns open their own: behind another one the model would write a turn that no parser takes.
    tokenizer = with_template(chat_tokenizer, chat_templates[family])
    renderer = Renderer(tokenizer, AgentConfig(layout="chat", instructions="Search."))
    turn = "<|im_start|>assistant\n"
    assert renderer.decode(renderer.prompt_ids("Who?")).endswith(f"Question: Who?<|im_end|>\n{turn}")
    for ids in (renderer.observation_ids(HITS), renderer.answer_demand_ids(at_turn_start=False)):
        text = renderer.decode(ids)
        assert text.startswith("<|im_end|>\n<|im_start|>user\n")
        assert turn in text
        assert "<think>" not in text


def test_qwen3_over_two_turns_keeps_its_own_thoughts_and_no_others(chat_tokenizer: Any) -> None:
    # MiniCPM-V 4.5 is made of Qwen3 and has its template, which comes with vLLM.
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations
    folder = Path(vllm.submodule_search_locations[0]) / "transformers_utils/chat_templates"
    tokenizer = with_template(chat_tokenizer, (folder / "template_minicpmv45.jinja").read_text())
    renderer = Renderer(tokenizer, AgentConfig(layout="chat", instructions="Search."))
    ids = (
        renderer.prompt_ids("Who?") + say(renderer, "<think> q </think>") + renderer.observation_ids(HITS[1:])
    )
    ids += say(renderer, "<record> r </record>\n<think> p </think>") + renderer.observation_ids(HITS[1:])
    passages = "<|im_start|>user\n<search>\n[1] A passage without a title.\n</search><|im_end|>\n"
    assert renderer.decode(ids) == (
        "<|im_start|>system\nSearch.<|im_end|>\n<|im_start|>user\nQuestion: Who?<|im_end|>\n"
        f"<|im_start|>assistant\n<think> q </think><|im_end|>\n{passages}"
        f"<|im_start|>assistant\n<record> r </record>\n<think> p </think><|im_end|>\n{passages}"
        "<|im_start|>assistant\n"
    )


def test_a_template_prints_the_date_of_the_configuration_and_not_todays(
    chat_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    tokenizer = with_template(chat_tokenizer, chat_templates["llama-3.1"])
    default = Renderer(tokenizer, AgentConfig(layout="chat"))
    assert "Today Date: 26 Jul 2024\n" in default.decode(default.prompt_ids("Who?"))
    config = AgentConfig.model_validate({"layout": "chat", "date": "2026-02-01"})
    other = Renderer(tokenizer, config)
    assert "Today Date: 01 Feb 2026\n" in other.decode(other.prompt_ids("Who?"))


def test_a_template_that_begins_turns_in_two_ways_is_refused(chat_tokenizer: Any) -> None:
    odd = with_template(
        chat_tokenizer,
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}(go){% endif %}",
    )
    with pytest.raises(UserError, match="begins the model's turns differently"):
        Renderer(odd, AgentConfig(layout="chat"))


def test_a_demand_for_an_answer_comes_as_a_user_turn_in_the_chat_layout(chat_tokenizer: Any) -> None:
    renderer = Renderer(chat_tokenizer, AgentConfig(layout="chat"))
    text = renderer.decode(renderer.answer_demand_ids(at_turn_start=False))
    assert text.startswith("<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<answer>")
    assert renderer.decode(renderer.answer_demand_ids(at_turn_start=True)) == "<answer>"


def test_the_chat_layout_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"agent\.layout=plain"):
        Renderer(tokenizer, AgentConfig(layout="chat"))


def test_a_template_that_loses_contents_is_refused(chat_tokenizer: Any) -> None:
    deaf = with_template(chat_tokenizer, "<|im_start|>{{ messages[0].content }}")
    with pytest.raises(UserError, match="loses"):
        Renderer(deaf, AgentConfig(layout="chat"))


def test_built_in_instructions_name_only_the_actions_that_are_on() -> None:
    everything = default_instructions(AgentConfig())
    assert all(tag in everything for tag in ("<think>", "<search>", "<record>", "<answer>"))
    plain = default_instructions(AgentConfig(think=False, search=False, record=False))
    assert "<answer>" in plain
    assert not any(tag in plain for tag in ("<think>", "<search>", "<record>"))


@given(answer=contents)
def test_the_gold_answer_replaces_the_models_own_behind_the_answer_tag(tokenizer: Any, answer: str) -> None:
    renderer = Renderer(tokenizer, AgentConfig())
    prompt = renderer.prompt_ids("q?")
    opened, own = say(renderer, "<answer>"), say(renderer, " wrong </answer>")
    ids = np.array([*prompt, *opened, *own], dtype=np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    trajectory = Trajectory(
        question_id="q",
        sample=3,
        policy_version=1,
        token_ids=ids,
        loss_mask=mask,
        logprobs=np.zeros(len(ids), dtype=np.float32),
        answer_start=len(prompt) + len(opened),
        steps=(),
        answer="wrong",
        stop_reason=StopReason.ANSWERED,
    )
    example = renderer.with_gold_answer(trajectory, answer, 0.25)
    assert renderer.decode(example.token_ids.tolist()) == f"Question: q?\n<answer> {answer} </answer>"
    assert example.loss_mask.tolist() == [False] * len(prompt) + [True] * (
        len(example.token_ids) - len(prompt)
    )
    assert (example.id, example.unit, example.number("log_weight")) == ("q/3", "q", 0.25)
    assert example.token_ids.dtype == np.int32


def test_a_gold_answer_has_the_tokens_that_a_model_writes(tokenizer: Any, tag_tokenizer: Any) -> None:
    for some_tokenizer in (tokenizer, tag_tokenizer):
        renderer = Renderer(some_tokenizer, AgentConfig())
        written = say(renderer, renderer.turn_text(Turn(answer="Mara Velin")))
        gold = renderer.answer_ids("Mara Velin")
        assert written[-len(gold) :] == gold
