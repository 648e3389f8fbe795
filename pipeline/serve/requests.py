"""What clients may ask for, in both of OpenAI's forms, and how it is checked.

A parameter that would change the answer and is not heeded is refused, never ignored. Those that say "as usual" (`n: 1`,
`presence_penalty: 0`, ...) are fine, for many clients send them, and so is null.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.agents.program import Sampling
from pipeline.serve.conversation import Said
from pipeline.serve.failures import ApiError, unsupported

_TURNS = "the length of an answer is set when the server starts (agent.max_turn_tokens, agent.max_searches)"
_TOOLS = "the agent uses its own search, and no tools of the client"
_FORM = "the agent answers in text"
_SCORES = "log-probabilities are not given"
_ONE = "there is one answer to a request"
_PENALTIES = "the agent's words are not changed on their way"
_STORED = "nothing is stored; send the whole conversation"

_UNSUPPORTED = {
    "max_tokens": _TURNS,
    "max_completion_tokens": _TURNS,
    "max_output_tokens": _TURNS,
    "max_tool_calls": _TURNS,
    "stop": _TURNS,
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "web_search_options": _TOOLS,
    "response_format": _FORM,
    "text": _FORM,
    "modalities": _FORM,
    "audio": _FORM,
    "prediction": _FORM,
    "verbosity": _FORM,
    "logprobs": _SCORES,
    "top_logprobs": _SCORES,
    "n": _ONE,
    "presence_penalty": _PENALTIES,
    "frequency_penalty": _PENALTIES,
    "logit_bias": _PENALTIES,
    "reasoning_effort": _TURNS,
    "reasoning": _TURNS,
    "store": _STORED,
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "background": _STORED,
    "instructions": "the agent has the instructions that it was trained with (agent.instructions)",
    "prompt": "there are no stored prompts",
    "service_tier": "there is one",
    "truncation": "a conversation that is too long is refused",
    "include": "replies always hold all of their parts",
}
"""Parameters of OpenAI's that are not heeded, and why."""
_AS_USUAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "store": (False,),
    "background": (False,),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
    "include": ([], ["file_search_call.results"]),
}
"""Values of these that ask for nothing else than what is done."""
_SENT_BACK = ("reasoning_content", "refusal", "annotations", "exsearch")
"""Of an assistant's message: what a reply of ours held, and clients send back with it. It is passed over."""


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

    def said(self, param: str) -> Said:
        """
        Raises:
            ApiError: it is not the user's or the assistant's, or has something else than text.
        """
        if self.role not in ("user", "assistant"):
            why = "the agent has its instructions from training, and uses its own search"
            raise ApiError(
                400,
                "unsupported_value",
                f"{param}: messages of the role {self.role} are not taken: {why}",
                param,
            )
        for key, value in (self.model_extra or {}).items():
            known = key in ("type", "id", "status") or (self.role == "assistant" and key in _SENT_BACK)
            if value is not None and not known:
                raise unsupported(f"{param}.{key}", "messages are text")
        parts = [self.content or ""] if not isinstance(self.content, list) else [p.text for p in self.content]
        return Said("assistant" if self.role == "assistant" else "user", "\n".join(parts), param)


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

    def check(self, name: str) -> None:
        """
        Raises:
            ApiError: another model, or a parameter that is not heeded.
        """
        if self.model != name:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {self.model[:80]!r}; this server has {name!r}",
                "model",
            )
        for key, value in (self.model_extra or {}).items():
            if value is None or any(value == usual for usual in _AS_USUAL.get(key, ())):
                continue
            if key in _UNSUPPORTED:
                raise unsupported(key, _UNSUPPORTED[key])
            raise ApiError(400, "unknown_parameter", f"there is no parameter {key[:80]!r}", key[:80])
        if self.top_p not in (None, 1.0) and not self.temperature:
            raise ApiError(400, "invalid_value", "top_p: without a temperature the answer is greedy", "top_p")

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

    @property
    def said(self) -> list[Said]:
        return [message.said(f"messages.{number}") for number, message in enumerate(self.messages)]


class SentBackItem(BaseModel):
    """An item of an earlier response that is not a message. The agent searches anew."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning", "file_search_call"]


class ResponsesRequest(Asked):
    """As in OpenAI's responses."""

    input: str | list[Message | SentBackItem] = Field(
        description="The question, or the conversation; the last message is the question."
    )

    @property
    def said(self) -> list[Said]:
        if isinstance(self.input, str):
            return [Said("user", self.input, "input")]
        return [
            item.said(f"input.{number}")
            for number, item in enumerate(self.input)
            if isinstance(item, Message)
        ]
