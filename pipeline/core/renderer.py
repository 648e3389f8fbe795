"""The agent's language: tags, prompts, and text <-> token ids.

Guarantees, each a property test:

- Token-in, token-out. Environment text is tokenised once, here, and appended; what the engine produced is appended as
  it is. The first n ids of a context never change as later turns arrive.
- Both layouts speak the same language. `plain` is one running text; `chat` renders through the model's own chat
  template, incrementally: only the text *between* two contents is ever taken from the template.
- Text from outside (questions, passages, results of actions, gold answers) cannot smuggle in special tokens, nor a tag
  that is a token of its own. (Tags that are plain text to the tokenizer are plain text in a passage too.)

One trajectory, plain layout:

    Question: Who founded the maker of the Silver Harp?
    <think> Which company makes the Silver Harp? </think>
    <search>
    [1] Silver Harp: The Silver Harp is made by Orvane.
    </search>
    <record> The Silver Harp is made by Orvane. </record>
    <think> Who founded Orvane? </think>
    ...
    <answer> Mara Velin </answer>

Where the agent selects, a turn behind passages begins with `<select> [1] </select>`. The environment does not show the
chosen passages again: they are in the context already, which must not change, and would only cost their tokens twice.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.core.actions import Action
from pipeline.core.config import AgentConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Example, TokenIds, Trajectory
from pipeline.core.turns import TurnGrammar, default_instructions
from retriever_service.passages.hits import Hit

_SLOT = "EXSEARCHSLOT"
_CHARACTERS_PER_TOKEN = 8
"""More than text has on average, so that looking at so many characters per token is mostly enough."""
_REMEMBERED = 4096
"""Texts of which the ids are kept, of each kind."""
_ANSWER_DEMAND = "No more searches are possible. Give the final answer now."


class Renderer(TurnGrammar):
    """Renders questions, passages, results and demands into token ids, and parses what the model writes.

    Args:
        tokenizer: a Hugging Face tokenizer.
        config: layout, tags and switches.

    Raises:
        UserError: `layout: chat` with a tokenizer that has no chat template, or what `TurnGrammar` raises.
    """

    def __init__(self, tokenizer: Any, config: AgentConfig) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
        # The same few texts of our own come in every turn, and the trajectories of a question find the same passages.
        self._ids_of_own = lru_cache(maxsize=_REMEMBERED)(self._encode_own)
        self._ids_of_document = lru_cache(maxsize=_REMEMBERED)(self._encode_document)
        single = [ids for tag in self.strings if len(ids := self.trusted_ids(tag)) == 1]
        self._tag_ids = {id_ for (id_,) in single}
        if config.layout == "chat":
            self._prompt_parts, self._user_turn_parts = self._chat_parts()
        else:
            lead = f"{config.instructions}\n\n" if config.instructions else ""
            self._prompt_parts = (f"{lead}Question: ", "\n")
            self._user_turn_parts = ("\n", "\n")

    def prompt_ids(self, question: str, hint: str = "") -> list[int]:
        """The context in front of the first turn.

        Args:
            hint: an answer that the question gives away.
        """
        if hint:
            question = f"{question} (Hint: the answer is {hint}. Find the evidence for it.)"
        bos = self._bos()
        before, after = self._prompt_parts
        # A space before a word belongs to the word's first token.
        lead, space = (before[:-1], " ") if before.endswith(" ") else (before, "")
        return [*bos, *self.trusted_ids(lead), *self._untrusted(space + question), *self.trusted_ids(after)]

    def observation_ids(self, hits: Sequence[Hit]) -> list[int]:
        """What the environment appends behind a sub-query. Without search: just the way to the next turn."""
        before, after = self._user_turn_parts
        if not self.config.search:
            return self.trusted_ids("\n") if self.config.layout == "plain" else []
        opening, closing = self.tags.search
        ids = self.trusted_ids(f"{before}{opening}\n")
        for rank, hit in enumerate(hits, start=1):
            text = f"{hit.passage.title}: {hit.passage.text}" if hit.passage.title else hit.passage.text
            ids += self.trusted_ids(f"[{rank}]")
            ids += self._ids_of_document(text).tolist()
            ids += self.trusted_ids("\n")
        return ids + self.trusted_ids(f"{closing}{after}")

    def result_ids(self, action: Action, result: str) -> list[int]:
        """What the environment appends behind a call of an action; a long result is cut as a passage is."""
        before, after = self._user_turn_parts
        opening, closing = action.result_tags
        shown = self._ids_of_document(result).tolist()
        return [*self.trusted_ids(f"{before}{opening}"), *shown, *self.trusted_ids(f" {closing}{after}")]

    def answer_demand_ids(self, *, at_turn_start: bool) -> list[int]:
        """The opening answer tag, written by the environment.

        Args:
            at_turn_start: the model has not begun its turn; otherwise it ended it with a sub-query or a call.
        """
        opening = self.tags.answer[0]
        if at_turn_start:
            return self.trusted_ids(opening)
        before, after = self._user_turn_parts
        if self.config.layout == "plain":
            return self.trusted_ids(f"\n{opening}")
        return self.trusted_ids(f"{before}{_ANSWER_DEMAND}{after}{opening}")

    def answer_ids(self, answer: str) -> list[int]:
        """A gold answer and the closing tag, to stand behind `Trajectory.answer_context`."""
        closing = self.tags.answer[1]
        if closing in self.tokenizer.all_special_tokens or any(tag in answer for tag in self.strings):
            return [*self._untrusted(f" {answer} "), *self.trusted_ids(closing)]
        # In one piece, so that the closing tag has the tokens that the model itself writes behind a space.
        return self._plain_ids(f" {answer} {closing}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included, byte for byte."""
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def split_at(self, token_ids: Sequence[int], end: int) -> tuple[int, str]:
        """How many of the first tokens write nothing but the first `end` characters, and what they leave of these.

        The rest is not empty where a token holds characters of both sides.
        """
        text = self.decode(token_ids)[:end]
        lengths = range(len(token_ids) + 1)
        count = bisect_left(lengths, end, key=lambda n: len(self.decode(token_ids[:n])))
        while not text.startswith(written := self.decode(token_ids[:count])):
            count -= 1
        return count, text[len(written) :]

    def with_gold_answer(self, trajectory: Trajectory, answer: str, log_weight: float) -> Example:
        """The M-step's example: the trajectory up to its answer tag, then the gold answer as a target."""
        gold, opening = self.answer_ids(answer), len(trajectory.answer_opening)
        own = trajectory.loss_mask[: trajectory.answer_start]
        return dataclasses.replace(
            Example.of(trajectory, log_weight=log_weight),
            token_ids=np.concatenate([trajectory.answer_context, np.asarray(gold, dtype=np.int32)]),
            loss_mask=np.concatenate([own, np.repeat([False, True], [opening, len(gold)])]),
        )

    def _bos(self) -> list[int]:
        """The tokenizer's own beginning-of-sequence id for plain text; a chat template writes its own."""
        if self.config.layout == "chat":
            return []
        ids: list[int] = self.tokenizer("a")["input_ids"]
        has_bos = self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]
        return ids[:1] if has_bos else []

    def trusted_ids(self, text: str) -> list[int]:
        """Ids of our own text; special tokens (the chat template's) are recognised."""
        return list(self._ids_of_own(text)) if text else []

    def _encode_own(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_document(self, text: str) -> TokenIds:
        """int32: a fraction of the memory that a list of Python's integers takes."""
        return np.asarray(self._first_tokens(f" {text}", self.config.max_document_tokens), dtype=np.int32)

    def _untrusted(self, text: str) -> list[int]:
        """Ids of text from outside; what looks like a special token or a tag stays plain text."""
        whole = self._plain_ids(text)
        if self._tag_ids.isdisjoint(whole):
            return whole
        tags = "|".join(map(re.escape, self.strings))
        # Cut inside of every tag, at any place where one begins.
        cuts = [0, *(match.start() + 1 for match in re.finditer(f"(?={tags})", text)), len(text)]
        cut = [i for start, end in pairwise(cuts) for i in self._plain_ids(text[start:end])]
        if self._tag_ids.isdisjoint(cut):
            return cut
        # The tokenizer makes a tag of something else, of other forms of its letters.
        return [i for character in text for i in self._plain_ids(character)]

    def _plain_ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def _first_tokens(self, text: str, count: int) -> list[int]:
        """The first ids of text from outside. However long it is, little more than these is looked at."""
        characters = _CHARACTERS_PER_TOKEN * count
        # Where the text is cut the last tokens are others than they would be, so some more are wanted than taken.
        while len(ids := self._untrusted(text[:characters])) < 1.5 * count and characters < len(text):
            characters *= 2
        return ids[:count]

    def _chat_parts(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Template text around the question, and from behind a model turn around the next user turn."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "agent.layout is chat, but the model's tokenizer has no chat template; use agent.layout=plain or an "
                "instruction-tuned model"
            )
        instructions = self.config.instructions or default_instructions(self.config)
        question = f"Question: {_SLOT}0"
        system = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        folded = [{"role": "user", "content": f"{instructions}\n\n{question}"}]
        for head in (system, folded):
            parts = self._split_template(head, instructions)
            if parts is not None:
                return parts
        raise UserError(
            "the tokenizer's chat template loses message contents, moves them, or begins the model's turns differently "
            "from turn to turn; use agent.layout=plain"
        )

    def _split_template(
        self, head: list[dict[str, str]], instructions: str
    ) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """The template's text around the slots; None if it does not take these first messages as they are.

        Some templates have no system role; some move the system message into the last user turn, which is another
        place in every turn. What begins a turn of the model is taken from turns in the middle of a conversation: a
        generation prompt may open a thought of its own behind it, which the agent's turns do not have.
        """
        import jinja2

        roles = ("assistant", "user", "assistant", "user")
        later = [{"role": role, "content": f"{_SLOT}{n}"} for n, role in enumerate(roles, start=1)]
        try:
            prompt = self._render(head, add_generation_prompt=True)
            conversation = self._render([*head, *later])
        except jinja2.TemplateError:
            return None
        texts = re.split("|".join(f"{_SLOT}{n}" for n in range(len(roles) + 1)), conversation)
        if len(texts) != len(roles) + 2:
            return None
        before, turn, between, next_turn, between_again, _ = texts
        generation_prompt = prompt.partition(f"{_SLOT}0")[2]
        if (space := turn.removeprefix(generation_prompt)).isspace():
            # The model writes it as a part of its first token.
            turn, next_turn = generation_prompt, next_turn.removesuffix(space)
        begins_alike = generation_prompt.startswith(turn) or turn.startswith(generation_prompt)
        if not (instructions in before and prompt.startswith(before) and begins_alike):
            return None
        return ((before, turn), (between, next_turn)) if between and between == between_again else None

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            # In place of the clock: the same prompts on every day.
            strftime_now=self.config.date.strftime,
        )
        return text
