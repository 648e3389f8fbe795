"""Actions beside the built-in ones: a user's class, found by the name that `agent.actions` gives.

Think, search, select, record and answer are the protocol itself. A further action stands where a sub-query may stand:

    turn       [select] [record] (think | answer | an action)
    behind it  what the environment says: passages behind think, the action's result behind an action

What the model writes between the action's tags is the *call*; the environment answers it with the *result*, between
tags of its own, and the model's next turn begins. A call is trained like everything that the model writes (unless
`trained` is false), a result never is. docs/actions.md writes one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from pipeline.core.errors import UserError
from pipeline.core.own_modules import of_own_module
from pipeline.core.records import Question, Step


class ActionUnavailable(RuntimeError):
    """What an action needs could not be reached: the infrastructure failed, the model did nothing wrong."""


class Action(ABC):
    """One action. An instance serves any number of trajectories at once, so it keeps nothing of any of them."""

    name: ClassVar[str]
    """In records and for people; no two actions of an agent have the same."""
    tags: ClassVar[tuple[str, str]]
    """Around the call, which the model writes."""
    result_tags: ClassVar[tuple[str, str]]
    """Around the result, which the environment writes."""
    instructions: ClassVar[str]
    """When and how to use it: a line of the built-in system prompt (`layout: chat`)."""
    trained: ClassVar[bool] = True
    """The call is a target of training. False: it is context only, for a model that knows the action already."""
    limit: ClassVar[int] = 5
    """Calls per trajectory; in place of a further one an answer is demanded, as behind the last search."""
    timeout_s: ClassVar[float] = 60.0
    """Deadline of one call, in seconds; what takes longer counts as unavailable."""

    @abstractmethod
    async def __call__(self, call: str, steps: Sequence[Step]) -> str:
        """The result, as text; it is cut at `agent.max_document_tokens`.

        A call that makes no sense is the model's fault and has a result like any other, which says so.

        Args:
            call: what the model wrote between the tags, never empty.
            steps: searches and calls of the trajectory so far.

        Raises:
            ActionUnavailable: the infrastructure failed. The trajectory ends, is run once more, then excluded.
        """

    def demonstrate(self, question: Question) -> Sequence[str]:
        """Calls that a perfect agent makes behind its last search: what the cold start teaches. None by default."""
        return ()


_PARTS = ("name", "tags", "result_tags", "instructions")


@lru_cache(maxsize=16)
def load_actions(names: tuple[str, ...]) -> tuple[Action, ...]:
    """An instance of each class, `module:Class`, the same ones at every call of a process.

    Raises:
        UserError: no such module or class, or it is no action.
    """
    return tuple(map(_load, names))


def _load(name: str) -> Action:
    where = f"agent.actions: {name}"
    kind = of_own_module(where, name, "class", "calculator:Calculator")
    if not (isinstance(kind, type) and issubclass(kind, Action)):
        raise UserError(f"{where} is no subclass of pipeline.core.actions.Action")
    if missing := [part for part in _PARTS if not hasattr(kind, part)]:
        raise UserError(f"{where} does not say its {', '.join(missing)}")
    try:
        return kind()
    except TypeError as error:
        raise UserError(f"{where} cannot be made without arguments: {error}") from error
