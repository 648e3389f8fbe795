"""What clients may ask for, in both of OpenAI's forms, and how it is checked.

What would change the answer and is not heeded is refused, unless the server is lenient: then it is passed over, and the
reply names it. Values that say "as usual" (`n: 1`, `presence_penalty: 0`, ...) are fine, for many clients send them; so
is null.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.agents.program import Sampling
from pipeline.serve.conversation import Said
from pipeline.serve.failures import ApiError

_TURNS = "the length of an answer is set when the server starts (agent.max_turn_tokens, agent.max_searches)"
_TOOLS = "the agent uses its own search, and no tools of the client"
_FORM = "the agent answers in text"
_SCORES = "log-probabilities are not given"
_PENALTIES = "the agent's words are not changed on their way"
_STORED = "nothing is stored; send the whole conversation"

_UNHEEDED = {
    "max_tokens": _TURNS,
    "max_completion_tokens": _TURNS,
    "max_output_tokens": _TURNS,
    "max_tool_calls": _TURNS,
    "stop": _TURNS,
    "reasoning_effort": _TURNS,
    "reasoning": _TURNS,
    "tools": _TOOLS,
    "functions": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "web_search_options": _TOOLS,
    "verbosity": "the agent answers as it was trained to",
    "presence_penalty": _PENALTIES,
    "frequency_penalty": _PENALTIES,
    "logit_bias": _PENALTIES,
    "instructions": "the agent has the instructions that it was trained with (agent.instructions)",
}
"""Parameters of OpenAI's that are not heeded, and why. With them the answer might be another one."""
_INDISPENSABLE = {
    "tool_choice": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _FORM,
    "text": _FORM,
    "modalities": _FORM,
    "audio": _FORM,
    "logprobs": _SCORES,
    "top_logprobs": _SCORES,
    "n": "there is one answer to a request",
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "background": _STORED,
    "prompt": "there are no stored prompts",
    "moderation": "nothing is moderated",
    "stream_options": "nothing is obfuscated",
}
"""Others, without which the client could not read the reply, the question were not whole, or a protection were missing:
no server passes them over."""
_SAME_ANSWER = frozenset(
    {
        "store",
        "truncation",
        "include",
        "service_tier",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)
"""Others, without which the answer is the same: every server passes them over."""
_AS_USUAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "verbosity": ("medium",),
    "store": (False,),
    "background": (False,),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
    "include": ([], ["file_search_call.results"]),
    "stream_options": ({}, {"include_obfuscation": False}),
    "tool_calls": ([],),
}
"""Values of these that ask for nothing else than what is done."""
_SENT_BACK = ("reasoning_content", "refusal", "annotations", "exsearch")
"""Of an assistant's message: what a reply of ours held, and clients send back with it. It is nothing to be heeded."""


def _is_as_usual(key: str, value: Any) -> bool:
    return value is None or any(value == usual for usual in _AS_USUAL.get(key, ()))


@dataclass(slots=True)
class PassedOver:
    """What a request asks for and does not get.

    Attributes:
        lenient: whether more is passed over than what leaves the answer as it is.
        params: what was, as error messages name it.
    """

    lenient: bool
    params: list[str] = field(default_factory=list)

    def add(self, param: str, why: str, code: str = "unsupported_parameter") -> None:
        """
        Raises:
            ApiError: the server is not lenient.
        """
        if not self.lenient:
            raise ApiError(400, code, f"{param}: {why} (`exsearch serve --lenient` passes it over)", param)
        self.params.append(param)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """A message of the user or the assistant."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant", "system", "developer", "tool", "function"]
    content: str | list[TextPart] | None = None

    def said(self, param: str, passed_over: PassedOver) -> Said | None:
        """None if it is passed over.

        Raises:
            ApiError: it is not the user's or the assistant's, or has something else than text.
        """
        not_taken = f"messages of the role {self.role} are not taken"
        if self.role in ("system", "developer"):
            why = f"{not_taken}: the agent has its instructions from training"
            passed_over.add(param, why, "unsupported_value")
            return None
        if self.role not in ("user", "assistant"):
            why = "the agent uses its own search"
            raise ApiError(400, "unsupported_value", f"{param}: {not_taken}: {why}", param)
        for key, value in (self.model_extra or {}).items():
            known = key in ("type", "id", "status") or (self.role == "assistant" and key in _SENT_BACK)
            if not known and not _is_as_usual(key, value):
                passed_over.add(f"{param}.{key[:80]}", "messages are text")
        parts = [self.content or ""] if not isinstance(self.content, list) else [p.text for p in self.content]
        return Said("assistant" if self.role == "assistant" else "user", "\n".join(parts), param)


class SentBackItem(BaseModel):
    """An item of an earlier response that is not a message. The agent searches anew."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning", "file_search_call"]


def conversation(items: Sequence[Message | SentBackItem], param: str, passed_over: PassedOver) -> list[Said]:
    """What the user and the assistant have said, from the user's first message on.

    What the assistant says before it is a greeting, which chat interfaces send along and the agent never gave.

    Raises:
        ApiError: as `Message.said`; or there is a greeting, and the server is not lenient.
    """
    messages = ((f"{param}.{number}", item) for number, item in enumerate(items) if isinstance(item, Message))
    said = [one for at, message in messages if (one := message.said(at, passed_over)) is not None]
    if not said or said[-1].role != "user":
        return said  # no question at its end: refused all the same
    begin = next(number for number, one in enumerate(said) if one.role == "user")
    for greeting in said[:begin]:
        passed_over.add(greeting.param, "the first message must be the user's", "invalid_value")
    return said[begin:]


class Asked(BaseModel):
    """What both forms have."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = Field(description="As in /v1/models.")
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Without it, or 0: greedy, as the agent is evaluated."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="With a temperature only.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="The same seed, version and question give the same answer."
    )
    user: str | None = Field(None, description="Has no effect.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect: all of a conversation is cached.")
    return_token_ids: bool | None = Field(
        None,
        description="An extension: `exsearch.token_ids` of the reply has the ids of the whole trajectory.",
    )

    def check(self, name: str, passed_over: PassedOver) -> None:
        """
        Raises:
            ApiError: another model, or a parameter that is not heeded and not passed over.
        """
        if self.model != name:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {self.model[:80]!r}; this server has {name!r}",
                "model",
            )
        for key, value in (self.model_extra or {}).items():
            if _is_as_usual(key, value):
                continue
            if key in _SAME_ANSWER:
                passed_over.params.append(key)
            elif key in _INDISPENSABLE:
                raise ApiError(400, "unsupported_parameter", f"{key}: {_INDISPENSABLE[key]}", key)
            elif key in _UNHEEDED:
                passed_over.add(key, _UNHEEDED[key])
            else:
                passed_over.add(key[:80], "there is no such parameter", "unknown_parameter")
        if self.top_p not in (None, 1.0) and not self.temperature:
            passed_over.add("top_p", "without a temperature the answer is greedy", "invalid_value")

    @property
    def sampling(self) -> Sampling:
        """Greedy unless there is a temperature."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, seed=seed)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = Field(None, description="A last chunk with the tokens.")
    include_obfuscation: Literal[False] | None = Field(None, description="There is none.")


class ChatRequest(Asked):
    """As in OpenAI's chat completions."""

    messages: list[Message] = Field(description="The conversation; the last message is the question.")
    stream_options: StreamOptions | None = None

    def said(self, passed_over: PassedOver) -> list[Said]:
        """
        Raises:
            ApiError: as `conversation`.
        """
        return conversation(self.messages, "messages", passed_over)


class ResponsesRequest(Asked):
    """As in OpenAI's responses."""

    input: str | list[Message | SentBackItem] = Field(
        description="The question, or the conversation; the last message is the question."
    )

    def said(self, passed_over: PassedOver) -> list[Said]:
        """
        Raises:
            ApiError: as `conversation`.
        """
        if isinstance(self.input, str):
            return [Said("user", self.input, "input")]
        return conversation(self.input, "input", passed_over)
