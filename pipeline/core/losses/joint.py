"""Several losses in one optimiser step, each over the examples of its own role.

    L = sum_p coefficient_p L_p          L_p with its own normaliser, over the step's examples of role p

Each step has its share of the examples of every role, and a packed row has examples of one role alone, so that parts
may need different outputs of the model. With `project_conflicts` the parts' gradients are told apart, and what of one
goes against another is taken out of it (PCGrad; Yu et al. 2020, arXiv 2001.06782, algorithm 1):

    g_p <- g_p - (g_p . g_q) / |g_q|^2 g_q       for every other part q, in their order, as long as g_p . g_q < 0

on the gradients of the coefficient's multiple, over all trained weights at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.core.losses.loss import Loss, Prepared
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class Part:
    """A loss over the examples of a role."""

    role: str
    loss: Loss
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True)
class Joint:
    """
    Args:
        parts: of different roles. At most one live reference is among their losses.
        project_conflicts: see above. Every rank then holds each part's gradient, of all trained weights in float32;
            ZeRO stage 3 is refused.

    Raises:
        ValueError: two parts of a role, a coefficient that is not above 0, or several references.
    """

    parts: tuple[Part, ...]
    project_conflicts: bool = False

    def __post_init__(self) -> None:
        roles = [part.role for part in self.parts]
        if len(set(roles)) < len(roles) or not roles:
            raise ValueError(f"a joint loss has one part for each role, not {roles}")
        if wrong := [part.role for part in self.parts if not part.coefficient > 0]:
            raise ValueError(f"coefficients of a joint loss are above 0; not so: {wrong}")
        if len({part.loss.reference for part in self.parts} - {None}) > 1:
            raise ValueError("a joint loss has one live reference at most")


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a phase minimises, a loss or a joint one, and which of its examples are whose.

    Attributes:
        parts: one of each role; of a lone loss one, of all roles.
        of_example: each example's part, by its number.
    """

    parts: tuple[Part, ...]
    of_example: tuple[int, ...]

    @classmethod
    def of(cls, loss: Loss | Joint, examples: Sequence[Outline]) -> Objectives:
        """
        Raises:
            ValueError: an example of a role that no part has.
        """
        if not isinstance(loss, Joint):
            return cls((Part("", loss),), (0,) * len(examples))
        numbers: Mapping[str, int] = {part.role: number for number, part in enumerate(loss.parts)}
        if unknown := next((example for example in examples if example.role not in numbers), None):
            raise ValueError(
                f"the joint loss has no part for the role {unknown.role} of example {unknown.id}; it has "
                f"{', '.join(numbers)}"
            )
        return cls(loss.parts, tuple(numbers[example.role] for example in examples))

    def loss_of(self, example: int) -> Loss:
        return self.parts[self.of_example[example]].loss

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        """Each part's `Loss.prepare` of its own examples, in the order of all. A stream is 0 where it is not theirs.

        Raises:
            ValueError: an example that its loss cannot take.
        """
        sizes, computed = [0.0] * len(examples), [False] * len(examples)
        streams: dict[str, list[float]] = {}
        for number, part in enumerate(self.parts):
            own = [k for k, of in enumerate(self.of_example) if of == number]
            prepared = part.loss.prepare([examples[k] for k in own])
            for place, k in enumerate(own):
                sizes[k], computed[k] = prepared.sizes[place], prepared.computed[place]
                for name, values in prepared.streams.items():
                    streams.setdefault(name, [0.0] * len(examples))[k] = values[place]
        return Prepared(sizes, computed, streams)


def without_conflicts(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the parts' gradients [P], each without what goes against another (see the head of this module)."""
    total = gradients[0].new_zeros(gradients[0].shape)
    for number, own in enumerate(gradients):
        left = own.clone()
        for other in (*gradients[:number], *gradients[number + 1 :]):
            dot, square = left @ other, other @ other
            if dot < 0 < square:  # the square of what hardly is there may be 0
                left.add_(other, alpha=-float(dot / square))
        total += left
    return total
