"""The grammar of turns: what a model may write in one, as text.

    [select] [record] (think | answer | an action)

Select and record stand where the turn before was answered with a search. There is nothing outside of the tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.actions import Action, load_actions
from pipeline.core.config import AgentConfig
from pipeline.core.errors import UserError
from pipeline.core.orderings import BadOrdering, ordering_text, parse_ordering

_BUILT_IN = frozenset({"think", "search", "select", "record", "answer"})


@dataclass(frozen=True, slots=True)
class Call:
    """An action, by its name, and what the model wants of it."""

    action: str
    content: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model said in one turn: what it selected and recorded, then a sub-query, a call or an answer."""

    record: str = ""
    query: str | None = None
    answer: str | None = None
    selected: tuple[int, ...] = ()
    """Places of the selected passages among the hits of the last search, from 0, the best first."""
    call: Call | None = None


class MalformedTurn(ValueError):
    """The text of a turn does not follow the protocol; the message says how."""


class TurnGrammar:
    """Writes and parses turns.

    Raises:
        UserError: an action that cannot be loaded, or two tags that are the same.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.tags = config.tags
        self.actions = {action.name: action for action in load_actions(config.actions)}
        if len(self.actions) < len(config.actions) or not _BUILT_IN.isdisjoint(self.actions):
            raise UserError(
                f"agent.actions must have different names, none of them {', '.join(sorted(_BUILT_IN))}; they are "
                f"{', '.join(action.name for action in load_actions(config.actions))}"
            )
        tags, actions = config.tags, self.actions.values()
        select = [tags.select] if config.select else []
        own = [*select, *(action.tags for action in actions)]
        pairs = [tags.think, tags.search, tags.record, tags.answer, *own, *(a.result_tags for a in actions)]
        self.strings: tuple[str, ...] = tuple(string for pair in pairs for string in pair)
        """Of all tags in use."""
        _check_tags(self.strings)
        self.written: tuple[str, ...] = tuple(
            string for pair in (tags.think, tags.record, tags.answer, *own) for string in pair
        )
        """Of the tags that the model writes."""
        self.stop: tuple[str, ...] = (
            *(tags.think[1], tags.answer[1], tags.search[0]),
            *(string for action in actions for string in (action.tags[1], action.result_tags[0])),
        )
        """Strings at which a turn ends; those that the environment writes end one that makes them up."""

    def turn_text(self, turn: Turn) -> str:
        """A turn as a well-behaved model writes it; inverse of `parse_turn`."""
        parts = [_tagged(self.tags.select, ordering_text(turn.selected))] if turn.selected else []
        if turn.record:
            parts.append(_tagged(self.tags.record, turn.record))
        if turn.query is not None:
            parts.append(_tagged(self.tags.think, turn.query))
        if turn.call is not None:
            parts.append(_tagged(self.actions[turn.call.action].tags, turn.call.content))
        if turn.answer is not None:
            parts.append(_tagged(self.tags.answer, turn.answer))
        return "\n".join(parts)

    def parse_turn(self, text: str, *, expects_record: bool, passages: int = 0) -> Turn:
        """The turn that `text` says.

        Args:
            passages: shown in front of it, and to be selected from; 0: no selection is expected.

        Raises:
            MalformedTurn: anything but what is expected, or something outside of the tags.
        """
        rest, record = text.strip(), ""
        selected: tuple[int, ...] = ()
        if passages:
            ordering, rest = _leading(self.tags.select, rest)
            try:
                selected = parse_ordering(ordering, passages, self.config.selected_documents)
            except BadOrdering as error:
                raise MalformedTurn(f"a bad selection, {error}") from error
        if expects_record:
            record, rest = _leading(self.tags.record, rest)
        kind, content = self._ending(rest)
        stray = next((string for string in self.strings if string in f"{record} {content}"), None)
        if stray is not None:
            raise MalformedTurn(f"{stray} inside of another action")
        if kind == "answer":
            return Turn(record=record, answer=content, selected=selected)
        if not content:
            raise MalformedTurn("empty sub-query" if kind == "think" else f"empty call of {kind}")
        if kind == "think":
            return Turn(record=record, query=content, selected=selected)
        return Turn(record=record, selected=selected, call=Call(kind, content))

    def opening_of(self, turn: Turn) -> str:
        """The opening tag of the turn's end: of its sub-query, its call or its answer."""
        if turn.call is not None:
            return self.actions[turn.call.action].tags[0]
        return (self.tags.think if turn.query is not None else self.tags.answer)[0]

    def _ending(self, rest: str) -> tuple[str, str]:
        """What ends a turn, and its content."""
        of_actions = {name: action.tags for name, action in self.actions.items()}
        endings = {"think": self.tags.think, "answer": self.tags.answer} | of_actions
        for kind, tag in endings.items():
            match = re.fullmatch(_pattern(tag), rest, re.DOTALL)
            if match is not None:
                return kind, match["content"].strip()
        *others, last = [tag[0] for tag in endings.values()]
        raise MalformedTurn(f"expected {', '.join(others)} or {last}, closed, and nothing else")


def default_instructions(config: AgentConfig) -> str:
    """The built-in system prompt; it names only the actions that are switched on."""
    tags, lines = config.tags, ["You answer a question by looking for evidence step by step."]
    if config.think:
        lines.append(
            f"Write one simple search query as {_tagged(tags.think, 'query')} and stop."
            + (f" The passages found come back between {' and '.join(tags.search)}." if config.search else "")
        )
    if config.select and config.search:
        named = min(config.selected_documents, config.documents)
        lines.append(
            f"Then name the passages that help most, the best first and at most {named}, as "
            f"{_tagged(tags.select, ordering_text(range(named - 1, -1, -1)))}."
        )
    if config.record:
        lines.append(f"Then note the facts you need as {_tagged(tags.record, 'facts')}.")
    if config.think:
        lines.append("Repeat this, one query at a time, until you know enough.")
    lines += [_of_action(action) for action in load_actions(config.actions)]
    lines.append(f"Finish with the shortest possible answer as {_tagged(tags.answer, 'answer')}.")
    return "\n".join(lines)


def _of_action(action: Action) -> str:
    return f"{action.instructions} The result comes back between {' and '.join(action.result_tags)}."


def _check_tags(strings: Sequence[str]) -> None:
    """
    Raises:
        UserError: two are the same, or one is empty.
    """
    if len(set(strings)) < len(strings) or not all(string.strip() for string in strings):
        raise UserError(
            f"the tags of the agent and its actions must be different, non-empty strings, not {' '.join(strings)}; "
            "change agent.tags, or tags and result_tags of the action"
        )


def _leading(tag: tuple[str, str], text: str) -> tuple[str, str]:
    """What is between the tags that `text` begins with, and what is behind them."""
    match = re.match(_pattern(tag), text, re.DOTALL)
    if match is None:
        raise MalformedTurn(f"expected {tag[0]} ... {tag[1]}")
    return match["content"].strip(), text[match.end() :].strip()


def _tagged(tag: tuple[str, str], content: str) -> str:
    return f"{tag[0]} {content} {tag[1]}"


def _pattern(tag: tuple[str, str]) -> str:
    return f"{re.escape(tag[0])}(?P<content>.*?){re.escape(tag[1])}"
