"""The M-step's loss: importance-weighted negative log-likelihood of the tokens that the model itself wrote.

For a batch B of trajectories with weights w_k and n_k trained tokens each,

    L = - sum_{k in B} v_k sum_{t in mask_k} log p(token_t | tokens before it) / sum_{k in B} n_k
    v_k = w_k * (sum n / sum w n)        both sums over the whole iteration

so the average weight of a token is 1 over the iteration, and a batch of failures stays small instead of
being scaled up. Both sums of L run over all ranks and micro-batches: the value does not depend on packing
or sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class WeightedNll:
    """The loss above. Stream: `weight`, w_k >= 0.

    Args:
        negligible_weight: examples with less than this share of the average weight are counted in the normaliser, but
            not computed; 0 computes all that have a weight.
    """

    negligible_weight: float = 0.0

    output: ClassVar[Output] = "logprobs"
    streams: ClassVar[Mapping[str, Form]] = {"weight": "number"}
    reference: ClassVar[str | None] = None

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        num_tokens = [example.num_targets for example in examples]
        exact = iteration_weights([example.number("weight") for example in examples], num_tokens)
        weights = [v if v >= self.negligible_weight else 0.0 for v in exact]
        return Prepared(
            sizes=num_tokens,
            computed=[bool(w and n) for w, n in zip(weights, num_tokens, strict=True)],
            streams={"v": weights},
        )

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        logprobs, weights = outputs.predicted, rows.per_target("v")
        computed = weights > 0
        return Terms(
            loss=-(logprobs * weights).sum() / normaliser,
            metrics={"nll": (-logprobs.detach()[computed].sum(), computed.sum())},
        )


def iteration_weights(weights: Sequence[float], num_tokens: Sequence[int]) -> list[float]:
    """v_k of every example of an iteration, from its weight w_k >= 0 and its number of trained tokens n_k.

    sum(v n) == sum(n) unless nothing has weight: then every v_k is 0, and the caller has nothing to train on.

    Raises:
        ValueError: a weight is negative, infinite or NaN, or the lengths differ.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    n = torch.tensor(num_tokens, dtype=torch.float64)
    if w.shape != n.shape:
        raise ValueError(f"{len(w)} weights for {len(n)} examples")
    if not torch.isfinite(w).all() or (w < 0).any():
        bad = [(k, weight) for k, weight in enumerate(weights) if not 0 <= weight < float("inf")]
        raise ValueError(f"importance weights must be finite and not negative; (example, weight): {bad[:5]}")
    if not (w * n).any():
        return [0.0] * len(w)
    w = w / w[n > 0].max()  # likelihoods as small as 1e-300 would otherwise under- or overflow
    return (w * (n.sum() / (w * n).sum())).tolist()
