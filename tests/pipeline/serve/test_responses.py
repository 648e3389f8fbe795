"""Responses as the official client meets them: an item per step."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from pipeline.core.records import StopReason
from tests.pipeline.serve_support import QUESTION, Running, serving, trajectory_of

ITEMS = ["reasoning", "file_search_call", "reasoning"] * 2 + ["message"]


@pytest.fixture
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def test_searches_are_tool_calls_with_their_passages_and_the_answer_cites_them(server: Running) -> None:
    reply = server.openai.responses.create(model="exsearch", input=QUESTION)

    assert (reply.output_text, reply.status) == ("Mara Velin", "completed")
    assert [item.type for item in reply.output] == ITEMS
    searches = [item for item in reply.output if item.type == "file_search_call"]
    assert [(search.queries, search.results[0].file_id) for search in searches if search.results] == [
        (["Who makes the Silver Harp?"], "p1"),
        (["Who founded Orvane?"], "p2"),
    ]
    message = reply.output[-1]
    assert message.type == "message" and message.content[0].type == "output_text"
    notes = message.content[0].annotations
    assert [(note.file_id, note.filename, note.index) for note in notes if note.type == "file_citation"] == [
        ("p2", "Orvane", len("Mara Velin")),
        ("p1", "Silver Harp", len("Mara Velin")),
    ]
    spans = reply.exsearch["citations"]  # type: ignore[attr-defined]
    assert [span["passage_id"] for span in spans] == ["p2", "p1"]
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, 6)
    assert reply.usage.output_tokens_details.reasoning_tokens == 4


def test_a_stream_tells_the_same_in_numbered_events(server: Running) -> None:
    with server.openai.responses.stream(model="exsearch", input=QUESTION) as stream:
        events = list(stream)
        final = stream.get_final_response()

    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    first_search = kinds.index("response.file_search_call.in_progress")
    assert kinds[first_search : first_search + 3] == [
        f"response.file_search_call.{stage}" for stage in ("in_progress", "searching", "completed")
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == "Mara Velin"
    assert [item.type for item in final.output] == ITEMS


def test_a_response_can_be_sent_back_with_the_next_question(server: Running) -> None:
    first = server.openai.responses.create(model="exsearch", input=QUESTION)
    said = [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in first.output)]
    server.openai.responses.create(model="exsearch", input=[*said, {"role": "user", "content": "And when?"}])  # type: ignore[list-item]
    assert server.agent.asked[-1][0] == f"{QUESTION}\nAnswer: Mara Velin\nQuestion: And when?"


@pytest.mark.parametrize(
    "refused",
    [
        {"previous_response_id": "resp_1"},
        {"instructions": "Rhyme."},
        {"max_output_tokens": 9},
        {"background": True},
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(server: Running, refused: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.openai.responses.create(model="exsearch", input=QUESTION, **refused)  # type: ignore[call-overload]
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", next(iter(refused)))


def test_what_a_lenient_server_passes_over_is_named_in_the_reply() -> None:
    said = [{"role": "developer", "content": "Rhyme."}, {"role": "user", "content": QUESTION}]
    with serving(lenient=True) as server:
        reply = server.openai.responses.create(
            model="exsearch",
            input=said,  # type: ignore[arg-type]
            instructions="Rhyme.",
            max_output_tokens=9,
            store=True,
        )
    assert sorted(reply.exsearch["ignored"]) == ["input.0", "instructions", "max_output_tokens", "store"]  # type: ignore[attr-defined]
    assert server.agent.asked[-1][0] == QUESTION


def test_an_answer_that_ran_out_of_room_is_incomplete(server: Running) -> None:
    server.agent.outcome = trajectory_of("", StopReason.LENGTH_LIMIT)
    reply = server.openai.responses.create(model="exsearch", input=QUESTION)
    assert reply.status == "incomplete" and reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"


def test_a_failure_in_mid_stream_is_typed(server: Running) -> None:
    server.agent.outcome = trajectory_of("", StopReason.ENGINE_ERROR)
    with pytest.raises(openai.APIError) as raised:
        list(server.openai.responses.create(model="exsearch", input=QUESTION, stream=True))
    assert raised.value.code == "engine_error"
