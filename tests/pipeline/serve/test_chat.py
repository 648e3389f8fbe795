"""Chat completions as the official client meets them, over an agent that plays a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pipeline.core.records import StopReason
from tests.pipeline.serve_support import QUESTION, Running, serving, trajectory_of


@pytest.fixture
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def messages(*texts: str) -> Any:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def test_an_answer_with_its_reasoning_its_tokens_and_where_it_comes_from(server: Running) -> None:
    reply = server.openai.chat.completions.create(model="exsearch", messages=messages(QUESTION))

    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Mara Velin", "stop")
    assert "Who founded Orvane?" in choice.message.reasoning_content  # type: ignore[attr-defined]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (4, 6, 10)
    assert reply.usage.prompt_tokens_details is None, "nobody has counted what was cached"
    extension = reply.exsearch  # type: ignore[attr-defined]
    assert (extension["version"], extension["stop_reason"], len(extension["steps"])) == (1, "answered", 2)
    first = extension["citations"][0]
    cited = extension["steps"][first["step"]]["hits"][0][first["field"]][first["start"] : first["end"]]
    assert (first["passage_id"], first["title"], cited) == ("p2", "Orvane", "Mara  Velin")


def test_a_stream_shows_each_step_in_its_order_then_the_answer(server: Running) -> None:
    stream = server.openai.chat.completions.create(
        model="exsearch", messages=messages(QUESTION), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    events = [
        chunk.exsearch["event"]["type"]
        for chunk in chunks
        if "event" in (chunk.model_extra or {}).get("exsearch", {})
    ]
    assert events == ["think", "search", "record", "think", "search", "record", "answer"]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Mara Velin"
    reasoning = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert any(text and "[1] Silver Harp" in text for text in reasoning)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(not delta.tool_calls for delta in deltas), "a client would make the calls itself"


def test_steps_come_while_the_answer_is_still_being_made(server: Running) -> None:
    server.agent.go_on.clear()
    stream = server.openai.chat.completions.create(model="exsearch", messages=messages(QUESTION), stream=True)
    seen = [next(stream) for _ in range(7)]
    assert server.agent.in_flight == 1 and seen[-1].exsearch["event"]["type"] == "record"  # type: ignore[attr-defined]
    server.agent.go_on.set()
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "stop"


def test_a_first_question_is_put_as_it_is_and_later_ones_behind_what_was_said(server: Running) -> None:
    server.ask()
    server.ask(messages=messages("Who made it?", "Orvane", "Who founded that?"))

    assert [question for question, _ in server.agent.asked] == [
        QUESTION,
        "Who made it?\nAnswer: Orvane\nQuestion: Who founded that?",
    ]


def test_a_reply_of_ours_can_be_sent_back_as_it_came(server: Running) -> None:
    first = server.openai.chat.completions.create(model="exsearch", messages=messages(QUESTION))
    said = first.choices[0].message.model_dump()
    reply = server.ask(messages=[*messages(QUESTION), said, {"role": "user", "content": "And when?"}])
    assert reply.status_code == 200
    assert server.agent.asked[-1][0] == f"{QUESTION}\nAnswer: Mara Velin\nQuestion: And when?"


def test_answers_are_greedy_unless_a_temperature_is_given(server: Running) -> None:
    server.ask()
    server.ask(temperature=0.7, top_p=0.9, seed=5)
    (_, greedy), (_, sampled) = server.agent.asked
    assert greedy.temperature == 0.0
    assert (sampled.temperature, sampled.top_p, sampled.seed) == (0.7, 0.9, 5)


def test_text_may_come_in_parts_and_unicode_goes_through(server: Running) -> None:
    server.agent.outcome = trajectory_of("Zoë 東京 \U0001f3b5")
    parts = [{"type": "text", "text": "Où est"}, {"type": "text", "text": "東京?"}]
    reply = server.ask(messages=[{"role": "user", "content": parts}])
    assert reply.json()["choices"][0]["message"]["content"] == "Zoë 東京 \U0001f3b5"
    assert server.agent.asked[-1][0] == "Où est\n東京?"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": "gpt-4o"}, "model_not_found", "model"),
        ({"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"top_p": 0.5}, "invalid_value", "top_p"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": messages("a", "b")}, "invalid_value", "messages.1"),
        ({"messages": messages("  ")}, "invalid_value", "messages.0"),
        ({"messages": messages("x" * 20_000)}, "invalid_value", None),
        ({"messages": [{"role": "system", "content": "Rhyme."}]}, "unsupported_value", "messages.0"),
        ({"messages": [{"role": "tool", "content": "42"}]}, "unsupported_value", "messages.0"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0"),
        (
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            "unsupported_parameter",
            "messages.0.name",
        ),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(
    server: Running, changes: dict[str, Any], code: str, param: str | None
) -> None:
    reply = server.ask(**changes)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (
        404 if code == "model_not_found" else 400,
        code,
        param,
    )
    assert error["type"] == "invalid_request_error" and error["message"]
    assert not server.agent.asked


SYSTEM = {"role": "system", "content": "Rhyme."}
GREETING = {"role": "assistant", "content": "What would you like to know?"}
WITH_A_NAME = {"role": "user", "content": QUESTION, "name": "Ann"}
UNHEEDED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [SYSTEM, *messages(QUESTION)]}, "messages.0"),
    ({"messages": [{**SYSTEM, "role": "developer"}, *messages(QUESTION)]}, "messages.0"),
    ({"messages": [WITH_A_NAME]}, "messages.0.name"),
    ({"messages": [GREETING, *messages(QUESTION)]}, "messages.0"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"stop": ["."]}, "stop"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}, "tools"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"top_p": 0.5}, "top_p"),
    ({"top_k": 40}, "top_k"),
]


@pytest.fixture(scope="module")
def lenient() -> Iterator[Running]:
    with serving(lenient=True) as running:
        yield running


@pytest.mark.parametrize(("changes", "name"), UNHEEDED)
def test_what_a_lenient_server_passes_over_is_named_in_the_reply(
    lenient: Running, changes: dict[str, Any], name: str
) -> None:
    reply = lenient.ask(**changes)
    assert reply.status_code == 200, reply.text
    assert reply.json()["exsearch"]["ignored"] == [name]
    question, sampling = lenient.agent.asked[-1]
    assert (question, sampling.temperature) == (QUESTION, 0.0)


@pytest.mark.parametrize(("changes", "name"), UNHEEDED)
def test_a_strict_server_names_the_switch(server: Running, changes: dict[str, Any], name: str) -> None:
    error = server.ask(**changes).json()["error"]
    assert error["param"] == name and "--lenient" in error["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"messages": [*messages(QUESTION), {"role": "tool", "content": "42"}, *messages("And?")]},
        {"messages": [SYSTEM]},
        {"messages": [GREETING]},
        {"model": "gpt-4o"},
    ],
)
def test_what_its_client_cannot_do_without_is_refused_by_a_lenient_server_too(
    lenient: Running, changes: dict[str, Any]
) -> None:
    reply = lenient.ask(**changes)
    assert reply.status_code in (400, 404) and "--lenient" not in reply.text


def test_a_stream_names_what_was_passed_over_at_its_end(lenient: Running) -> None:
    stream = lenient.openai.chat.completions.create(
        model="exsearch", messages=[SYSTEM, *messages(QUESTION)], max_tokens=5, stream=True
    )
    assert list(stream)[-1].exsearch["ignored"] == ["max_tokens", "messages.0"]  # type: ignore[attr-defined]


def test_values_that_say_as_usual_are_fine(server: Running) -> None:
    reply = server.ask(
        n=1, presence_penalty=0, frequency_penalty=0.0, tools=[], tool_choice="auto", logit_bias=None, user="me",
        response_format={"type": "text"}, store=False, stop=None, temperature=0, top_p=1,
    )  # fmt: skip
    assert reply.status_code == 200 and reply.json()["exsearch"]["ignored"] == []


def test_what_leaves_the_answer_as_it_is_is_passed_over_and_named(server: Running) -> None:
    reply = server.ask(store=True, service_tier="flex", prompt_cache_retention="24h")
    assert reply.status_code == 200
    assert reply.json()["exsearch"]["ignored"] == ["store", "service_tier", "prompt_cache_retention"]


def test_an_answer_that_ran_out_of_room_says_so(server: Running) -> None:
    server.agent.outcome = trajectory_of("", StopReason.LENGTH_LIMIT)
    choice = server.ask().json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (StopReason.ENGINE_ERROR, 503),
        (StopReason.RETRIEVER_UNAVAILABLE, 503),
        (StopReason.RETRIEVER_BAD_ANSWER, 502),
        (StopReason.ACTION_UNAVAILABLE, 503),
    ],
)
def test_what_infrastructure_does_is_an_error_with_its_name(
    server: Running, reason: StopReason, status: int
) -> None:
    server.agent.outcome = trajectory_of("", reason)
    reply = server.ask()
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, reason.value)

    with pytest.raises(openai.APIError) as raised:
        list(
            server.openai.chat.completions.create(model="exsearch", messages=messages(QUESTION), stream=True)
        )
    assert raised.value.code == reason.value


def test_a_fault_of_the_server_tells_nothing(server: Running) -> None:
    server.agent.failure = ZeroDivisionError("secret")
    reply = server.ask()
    assert (reply.status_code, reply.json()["error"]["code"], "secret" in reply.text) == (
        500,
        "internal",
        False,
    )


def test_token_ids_come_where_they_are_asked_for(server: Running) -> None:
    assert server.ask(return_token_ids=True).json()["exsearch"]["token_ids"] == list(range(10))
    assert "token_ids" not in server.ask().json()["exsearch"]


def test_a_body_that_is_not_json_is_refused(server: Running) -> None:
    with server.http as client:
        for content, headers, status in (
            (b"{", {"content-type": "application/json"}, 400),
            (b"{}", {"content-type": "text/plain"}, 415),
            (b"[1]", {"content-type": "application/json"}, 400),
            (b'"' + b"x" * 2**21 + b'"', {"content-type": "application/json"}, 413),
        ):
            reply = client.post("/v1/chat/completions", content=content, headers=headers)
            assert reply.status_code == status and json.loads(reply.content)["error"]["code"], content[:9]
