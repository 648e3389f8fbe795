"""The M-step's loss: importance-weighted negative log-likelihood of the tokens that the model itself wrote.

For a batch B of trajectories with weights w_k, given as logarithms, and n_k trained tokens each,

    L = - sum_{k in B} v_k sum_{t in mask_k} log p(token_t | tokens before it) / sum_{k in B} n_k
    v_k = w_k * (sum n / sum w n)        both sums over the whole iteration

so the average weight of a token is 1 over the iteration, and a batch of failures stays small instead of
being scaled up. Both sums of L run over all ranks and micro-batches: the value does not depend on packing
or sharding. An example that stands for several copies (`pipeline.core.copies`) has their summed weight, and its n_k
counts as often in the sums of n.

With `by_token` the weight of a token is v_k c_kt; c averages 1 over the targets of an example, so v_k stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.core.copies import COPIES, CREDIT, copies_of
from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class WeightedNll:
    """The loss above. Streams: `log_weight`, log w_k, minus infinity for a weight of zero; with `by_token` also
    `credit`, c_kt; and `copies`, where an example stands for several.

    Args:
        negligible_weight: examples with less than this share of the average weight are counted in the normaliser, but
            not computed; 0 computes all that have a weight.
        by_token: whether the tokens of an example have weights of their own.
    """

    negligible_weight: float = 0.0
    by_token: bool = False

    output: ClassVar[Output] = "logprobs"
    reference: ClassVar[str | None] = None
    compares: ClassVar[bool] = False

    @property
    def streams(self) -> Mapping[str, Form]:
        own: dict[str, Form] = {"log_weight": "logarithm"}
        return own | {CREDIT: "tokens"} if self.by_token else own

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        num_tokens = [example.num_targets for example in examples]
        copies = [copies_of(example) for example in examples]
        exact = iteration_weights([example.number("log_weight") for example in examples], num_tokens, copies)
        # Of several copies the summed weight, so many times as much is negligible.
        weights = [v if v >= self.negligible_weight * c else 0.0 for v, c in zip(exact, copies, strict=True)]
        return Prepared(
            sizes=[n * c for n, c in zip(num_tokens, copies, strict=True)],
            computed=[bool(w and n) for w, n in zip(weights, num_tokens, strict=True)],
            streams={"v": weights, COPIES: copies},
        )

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        logprobs, weights = outputs.predicted, rows.per_target("v")
        computed, copies = weights > 0, rows.per_target(COPIES)
        if self.by_token:
            weights = weights * rows.per_target(CREDIT)
        return Terms(
            loss=-(logprobs * weights).sum() / normaliser,
            metrics={"nll": (-(logprobs.detach() * copies)[computed].sum(), copies[computed].sum())},
        )


def iteration_weights(
    log_weights: Sequence[float], num_tokens: Sequence[int], copies: Sequence[int] | None = None
) -> list[float]:
    """v_k of every example of an iteration, from log w_k and its number of trained tokens n_k.

    sum(v n) == sum(copies n) unless nothing has weight: then every v_k is 0, and the caller has nothing to train on.

    Args:
        copies: how many examples each stands for, whose weights are summed in its own. None: itself alone.

    Raises:
        ValueError: a weight is infinite or NaN, or the lengths differ.
    """
    average = average_log_weight(log_weights, num_tokens, copies)
    if math.isinf(average):
        return [0.0] * len(log_weights)
    return torch.exp(torch.tensor(log_weights, dtype=torch.float64) - average).tolist()


def average_log_weight(
    log_weights: Sequence[float], num_tokens: Sequence[int], copies: Sequence[int] | None = None
) -> float:
    """log(sum w n / sum (copies n)): the logarithm of the average weight of a token. Minus infinity if nothing has
    weight.

    Raises:
        ValueError: a weight is infinite or NaN, or the lengths differ.
    """
    logs = torch.tensor(log_weights, dtype=torch.float64)
    n = torch.tensor(num_tokens, dtype=torch.float64)
    c = torch.ones_like(n) if copies is None else torch.tensor(copies, dtype=torch.float64)
    if logs.shape != n.shape:
        raise ValueError(f"{len(logs)} weights for {len(n)} examples")
    if (bad := logs.isnan() | logs.isposinf()).any():
        found = [(k, log_weights[k]) for k in torch.nonzero(bad).flatten().tolist()]
        raise ValueError(f"importance weights must be finite; (example, logarithm): {found[:5]}")
    log_total = torch.logsumexp(logs + n.log(), dim=0)
    return -math.inf if log_total.isneginf() else float(log_total - (c * n).sum().log())
