"""Messages -> the question that the agent gets.

The agent has learnt to answer questions, one at a time. So a first question is put to it as it is, token for token as
`exsearch ask` does it. Where turns came before, they stand in front of it:

    Who made the Silver Harp?
    Answer: Orvane
    Question: Who founded that company?

That only ever grows at its end, so that the engine finds what it has computed for the turns before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.serve.failures import ApiError


@dataclass(frozen=True, slots=True)
class Said:
    """One message: who said what. `param` names it in error messages."""

    role: Literal["user", "assistant"]
    text: str
    param: str


def question_of(messages: Sequence[Said]) -> str:
    """The question of a conversation, with what was said before it.

    Messages of one person that follow each other are one, a line each.

    Args:
        messages: the user begins.

    Raises:
        ApiError: there is no question at its end, or it says nothing.
    """
    if not messages:
        raise ApiError(400, "invalid_value", "there is no message; the last one is the question", "messages")
    last = messages[-1]
    if last.role != "user":
        raise ApiError(400, "invalid_value", "the last message must be the user's: the question", last.param)
    if not last.text.strip():
        raise ApiError(400, "invalid_value", "the question is empty; say what you want to know", last.param)
    turns: list[tuple[str, list[str]]] = []
    for message in messages:
        if turns and turns[-1][0] == message.role:
            turns[-1][1].append(message.text.strip())
        else:
            turns.append((message.role, [message.text.strip()]))
    first, *others = ("\n".join(texts) for _, texts in turns)
    heads = ("Answer: ", "Question: ")
    return "\n".join([first, *(f"{heads[number % 2]}{text}" for number, text in enumerate(others))])
