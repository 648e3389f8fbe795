"""What a learner checks of its examples before it trains on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.learner_outputs import check_streams
from pipeline.core.errors import UserError
from pipeline.core.losses.contrastive import InfoNce
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.loss import Loss
from pipeline.core.losses.policy_gradient import ClippedRatio
from pipeline.core.losses.preference import Dpo
from pipeline.core.records import Example

MASK = np.array([False, False, True, True])


def example(**streams: Any) -> Example:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in streams.items()}
    return Example("q7/3", "q7", "policy", np.arange(4, dtype=np.int32), MASK, arrays)


@pytest.mark.parametrize(
    ("loss", "streams", "message"),
    [
        (
            Dpo(),
            {"reference_logprob": [-3.0]},
            "Dpo needs the stream label, which example q7/3 has not; it has reference_logprob",
        ),
        (
            Dpo(),
            {"label": [1.0], "reference_logprob": [0.0, 0.0, -1.0, -2.0]},
            r"Dpo needs the stream reference_logprob as one number; that of example q7/3 has the shape \[4\]",
        ),
        (
            ClippedRatio(),
            {"advantage": [[1.0, 2.0], [3.0, 4.0]], "old_logprob": [-1.0] * 4},
            r"ClippedRatio needs the stream advantage as one number per token, or one for all; .* \[2, 2\]",
        ),
        (
            Divergence(),
            {"reference_logits": [0.0] * 4},
            r"Divergence needs the stream reference_logits as a row of numbers per target; .* \[4\]",
        ),
        (
            ClippedRatio(),
            {"advantage": [1.0], "old_logprob": [0.0, 0.0, np.nan, -1.0]},
            "ClippedRatio needs a finite stream old_logprob; that of example q7/3 is not",
        ),
    ],
)
def test_a_stream_that_a_loss_cannot_take_is_named_with_its_example(
    loss: Loss, streams: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_streams([example(**streams)], loss, "lm")


def test_what_stands_on_tokens_that_are_no_targets_does_not_matter() -> None:
    old_logprob = [np.nan, np.nan, -1.0, -2.0]  # as a trajectory has them
    check_streams([example(advantage=[-1.0], old_logprob=old_logprob)], ClippedRatio(), "lm")


def test_a_head_that_does_not_give_what_a_loss_needs_is_named() -> None:
    with pytest.raises(UserError, match="InfoNce needs embeddings, which a head lm does not give"):
        check_streams([], InfoNce(), "lm")
