"""What a loss is: an object that says which streams it needs, prepares the constants of a whole phase, and turns the
outputs of one packed row into its share of the loss.

The learner adds the shares of all packed rows and ranks of an optimiser step. A loss is therefore a sum over tokens,
examples or units, divided by a normaliser that the learner sums over the whole step; its value and its gradient do not
depend on packing, ranks or accumulation. Examples of one unit (a pair, a group) are in the same row if it compares
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from pipeline.core.records import Outline

Output = Literal["logprobs", "logits", "values", "embeddings"]

Form = Literal["number", "logarithm", "tokens", "rows"]
"""Of a stream: one number per example; the same, or minus infinity; one per token, or one for all of them; several per
target. All are finite but for a logarithm of zero."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a loss makes of the N examples of a phase before the first step.

    Attributes:
        sizes: each example's share of its step's normaliser, at least 0.
        computed: False for an example that counts in the normaliser but contributes nothing else: it is not run.
        streams: further streams, one number per example.
    """

    sizes: Sequence[float]
    computed: Sequence[bool]
    streams: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The packed row that the outputs belong to: n examples with M target tokens, on the device of the outputs.

    Attributes:
        example_of_target: [M], position of the target's example among the n.
        unit: [n], examples of the same number form a unit.
        numbers: float32 [n], the streams of one number per example.
        streams: float32, the others: [M] of one number per token, [M, R] of R per target token.
    """

    example_of_target: Tensor
    unit: Tensor
    numbers: Mapping[str, Tensor]
    streams: Mapping[str, Tensor]

    @property
    def num_examples(self) -> int:
        return len(self.unit)

    def sums(self, values: Tensor) -> Tensor:
        """Per-example sums [n] of per-target values [M]."""
        zeros = values.new_zeros(self.num_examples)
        return zeros.index_add(0, self.example_of_target, values)

    def per_target(self, stream: str) -> Tensor:
        """A stream [M] that examples gave per token, or once for all their tokens."""
        if stream in self.numbers:
            return self.numbers[stream][self.example_of_target]
        return self.streams[stream]


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What the model computed; of the first three, what the loss asked for.

    Attributes:
        predicted: `logprobs` [M], `logits` [M, V], `values` [M] or `embeddings` [n, D], as `Loss.output` says.
        reference: the same of the live reference, `logprobs` or `logits`; None without one.
    """

    predicted: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """A row's share of the loss, a scalar with a gradient, and of further metrics: name -> (sum, count)."""

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)


class Loss(Protocol):
    """Picklable: it travels to every rank. A frozen dataclass is the usual form."""

    @property
    def output(self) -> Output:
        """What it is computed from."""

    @property
    def streams(self) -> Mapping[str, Form]:
        """The streams that every example must have."""

    @property
    def reference(self) -> str | None:
        """Model directory of a frozen model whose outputs on the same tokens it needs; None: of none."""

    @property
    def compares(self) -> bool:
        """Whether it compares the examples of a unit, and so needs all of them in one row."""

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        """
        Raises:
            ValueError: an example that this loss cannot take.
        """
        ...

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        """
        Args:
            normaliser: sum of `Prepared.sizes` over the whole optimiser step, at least 1.
        """
        ...
