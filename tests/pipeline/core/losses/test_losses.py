"""Losses on plain tensors: shares of packed rows add up to the whole, and what a loss cannot take is refused.

Values and gradients against plain formulas, on real ranks: `tests/actors/test_losses_on_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from pipeline.core.losses.contrastive import InfoNce
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Loss, Outputs, Rows, Terms
from pipeline.core.losses.policy_gradient import ClippedRatio, ClippedValue
from pipeline.core.losses.preference import Cpo, Dpo, SimPo
from pipeline.core.packing import collate
from pipeline.core.records import Example

NUM_UNITS, TOKENS, DIMENSION = 4, 6, 5


def pair(number: int) -> list[Example]:
    """A unit of two examples with the streams of every loss."""
    random = np.random.default_rng(number)
    examples = []
    for member, label in enumerate((1.0, -1.0)):
        mask = random.random(TOKENS) < 0.6
        mask[-1] = True
        streams = {
            "log_weight": np.log(random.random(1)),
            "credit": random.random(TOKENS),
            "label": np.array([label]),
            "reference_logprob": random.normal(size=1),
            "advantage": random.normal(size=TOKENS),
            "old_logprob": random.normal(size=TOKENS),
            "return": random.normal(size=TOKENS),
            "old_value": random.normal(size=TOKENS),
            "is_query": np.array([float(member == 0)]),
            "group": np.array([0.0]),
        }
        ids = np.arange(TOKENS, dtype=np.int32)
        examples.append(Example(f"{number}/{member}", f"unit {number}", "policy", ids, mask, streams))
    return examples


def rows(pack: Sequence[int], examples: Sequence[Example], loss: Loss) -> Rows:
    batch = collate(tuple(pack), examples, loss.streams, loss.prepare(examples).streams)
    return Rows(
        torch.from_numpy(batch.example_of_target),
        torch.from_numpy(batch.unit),
        {name: torch.from_numpy(values) for name, values in batch.numbers.items()},
        {name: torch.from_numpy(values) for name, values in batch.streams.items()},
    )


def predicted(pack: Sequence[int], examples: Sequence[Example], loss: Loss) -> torch.Tensor:
    """The same for an example whatever it is packed with."""
    parts = []
    for k in pack:
        generator = torch.Generator().manual_seed(k)
        size = (1, DIMENSION) if loss.output == "embeddings" else (examples[k].num_targets,)
        parts.append(torch.randn(size, generator=generator))
    return torch.cat(parts)


def terms(pack: Sequence[int], examples: Sequence[Example], loss: Loss) -> Terms:
    normaliser = max(1.0, sum(loss.prepare(examples).sizes))
    outputs = Outputs(predicted(pack, examples, loss))
    return loss.terms(outputs, rows(pack, examples, loss), normaliser)


LOSSES: tuple[Loss, ...] = (
    WeightedNll(),
    WeightedNll(by_token=True),
    Dpo(nll_coefficient=0.5),
    Cpo(),
    SimPo(),
    ClippedRatio(kl_coefficient=0.1),
    ClippedRatio(mean_over="group"),
    ClippedRatio(mean_over="sequence"),
    ClippedValue(clip=0.1),
    InfoNce(),
)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@given(order=st.permutations(range(NUM_UNITS)), cut=st.integers(0, NUM_UNITS))
def test_shares_of_rows_add_up_whatever_is_packed_together(loss: Loss, order: list[int], cut: int) -> None:
    examples = [example for number in range(NUM_UNITS) for example in pair(number)]
    whole = terms(range(len(examples)), examples, loss).loss
    packs = [[k for unit in part for k in (2 * unit, 2 * unit + 1)] for part in (order[:cut], order[cut:])]
    shares = [terms(pack, examples, loss).loss for pack in packs if pack]
    torch.testing.assert_close(sum(shares), whole)


def test_a_query_is_compared_with_the_passages_of_its_own_unit_only() -> None:
    loss = InfoNce(temperature=0.5)
    alone = [
        terms([2 * unit, 2 * unit + 1], [e for u in range(2) for e in pair(u)], loss) for unit in range(2)
    ]
    # One passage in the unit: nothing to confuse it with.
    assert [share.loss.item() for share in alone] == [0.0, 0.0]


def test_info_nce_is_the_cross_entropy_over_the_passages() -> None:
    loss, examples = InfoNce(temperature=0.5), []
    for k in range(3):
        for member, example in enumerate(pair(k)):
            streams = {"is_query": np.array([float(member == 0)]), "group": np.array([float(k)])}
            examples.append(Example(example.id, "all", "x", example.token_ids, example.loss_mask, streams))
    embeddings = normalize(predicted(range(6), examples, loss), dim=-1)
    scores = embeddings[0::2] @ embeddings[1::2].T / 0.5
    expected = cross_entropy(scores, torch.arange(3))
    torch.testing.assert_close(terms(range(6), examples, loss).loss, expected)


def test_a_value_is_clipped_around_the_old_one_against_the_pessimist() -> None:
    example = pair(0)[0]
    loss = ClippedValue(clip=0.1)
    values = predicted([0], [example], loss)
    mask = np.flatnonzero(example.loss_mask)
    targets, old = (
        torch.from_numpy(example.streams[n][mask[mask > 0]]).float() for n in ("return", "old_value")
    )
    clipped = torch.minimum(torch.maximum(values, old - 0.1), old + 0.1)
    expected = torch.maximum((values - targets) ** 2, (clipped - targets) ** 2).mean() / 2
    torch.testing.assert_close(terms([0], [example], loss).loss, expected)


@pytest.mark.parametrize("loss", [Dpo(), Cpo(), SimPo()], ids=lambda loss: type(loss).__name__)
def test_a_unit_that_is_no_pair_is_refused(loss: Loss) -> None:
    with pytest.raises(
        ValueError, match=r"unit 0 must hold a chosen and a rejected example, has the labels \[1\.0\]"
    ):
        loss.prepare(pair(0)[:1])


def test_a_query_without_a_passage_is_refused() -> None:
    with pytest.raises(ValueError, match="must have one passage of its own"):
        InfoNce().prepare(pair(0)[:1])


def test_metrics_of_pairs_say_how_many_are_ranked_rightly() -> None:
    examples = [example for number in range(NUM_UNITS) for example in pair(number)]
    right, count = terms(range(len(examples)), examples, SimPo()).metrics["accuracy"]
    assert 0 <= float(right) <= count == NUM_UNITS
