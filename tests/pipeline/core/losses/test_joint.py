"""Which loss has which examples, and gradients that go against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Objectives, Part, without_conflicts
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.preference import SimPo
from pipeline.core.records import Example

NLL, KL = WeightedNll(negligible_weight=0.1), Divergence("symmetric")
JOINT = Joint((Part("searcher", NLL), Part("flashback", KL, 0.5)))


def example(name: str, role: str, log_weight: float = 0.0) -> Example:
    made = Example.supervised(name, role, [1, 2], [3])
    return replace(made, streams={"log_weight": np.array([log_weight])})


def test_each_loss_prepares_the_examples_of_its_role() -> None:
    examples = [example("a", "searcher"), example("b", "flashback"), example("c", "searcher", -9.0)]
    objectives = Objectives.of(JOINT, examples)
    prepared = objectives.prepare(examples)
    alone = NLL.prepare([examples[0], examples[2]])
    assert [objectives.loss_of(k) for k in range(3)] == [NLL, KL, NLL]
    assert prepared.sizes == [1, 1, 1]
    # The third has a negligible weight among the searcher's two; the second is in nobody's average.
    assert prepared.computed == [True, True, False]
    assert prepared.streams["v"] == [alone.streams["v"][0], 0.0, alone.streams["v"][1]]


def test_a_lone_loss_has_all_examples_whatever_their_roles() -> None:
    examples = [example("a", "selector"), example("b", "generator")]
    objectives = Objectives.of(NLL, examples)
    prepared, alone = objectives.prepare(examples), NLL.prepare(examples)
    assert objectives.of_example == (0, 0)
    assert (prepared.sizes, prepared.computed, prepared.streams) == (
        alone.sizes,
        alone.computed,
        alone.streams,
    )


def test_an_example_that_no_part_has_is_named() -> None:
    with pytest.raises(ValueError, match="no part for the role critic of example a; it has searcher, flash"):
        Objectives.of(JOINT, [example("a", "critic")])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "one part for each role"),
        ((Part("a", NLL), Part("a", KL)), "one part for each role"),
        ((Part("a", NLL, 0.0),), "above 0"),
        ((Part("a", Divergence(reference="x")), Part("b", Divergence(reference="y"))), "one live reference"),
    ],
)
def test_what_makes_no_joint_loss_is_refused(parts: tuple[Part, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Joint(parts)


def test_losses_that_compare_and_that_do_not_go_together() -> None:
    joint = Joint((Part("pair", SimPo()), Part("searcher", NLL)))
    pair = [
        replace(example(f"p{k}", "pair"), unit="p", streams={"label": np.array([k])}) for k in (1.0, -1.0)
    ]
    prepared = Objectives.of(joint, [*pair, example("a", "searcher")]).prepare(
        [*pair, example("a", "searcher")]
    )
    assert prepared.sizes == [0.5, 0.5, 1]


vectors = arrays.arrays(np.float64, (3, 5), elements=st.integers(-1000, 1000).map(lambda n: n / 100))


@given(vectors)
def test_two_gradients_lose_what_goes_against_the_other_and_nothing_else(rows: np.ndarray) -> None:
    a, b = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
    dot = float(a @ b)
    found = without_conflicts([a, b])
    if dot >= 0:
        torch.testing.assert_close(found, a + b)
        return
    # Each is projected onto the plane that the other is normal to (Yu et al. 2020, figure 2).
    without_b = a - dot / float(b @ b) * b
    without_a = b - dot / float(a @ a) * a
    torch.testing.assert_close(found, without_b + without_a)
    assert float(without_b @ b) == pytest.approx(0, abs=1e-6 * float(b @ b + 1) * 10)
    # Neither objective is made worse by the step, to first order.
    assert float(found @ a) >= -1e-6 * (1 + float(a @ a)) and float(found @ b) >= -1e-6 * (1 + float(b @ b))


@given(vectors)
def test_of_three_each_is_freed_of_the_others_as_they_were(rows: np.ndarray) -> None:
    """Algorithm 1 of Yu et al.: what is left of a gradient is projected on, the others are not changed by it."""
    expected = np.zeros(5)
    for number in range(3):
        left = rows[number].copy()
        for other in range(3):
            if other != number and left @ rows[other] < 0:
                left = left - (left @ rows[other]) / (rows[other] @ rows[other]) * rows[other]
        expected += left
    found = without_conflicts([torch.from_numpy(row) for row in rows])
    # Where a product is 0 but for rounding, both ways are one.
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_what_hardly_is_there_takes_nothing_out() -> None:
    large, tiny = torch.tensor([1.0, 0.0]), torch.tensor([-1e-30, 0.0])
    torch.testing.assert_close(without_conflicts([large, tiny]), large, atol=1e-6, rtol=0)


@given(vectors)
def test_one_gradient_is_itself_and_those_at_right_angles_are_added(rows: np.ndarray) -> None:
    a = torch.from_numpy(rows[0])
    torch.testing.assert_close(without_conflicts([a]), a)
    axes = [torch.zeros(5, dtype=torch.float64) for _ in range(3)]
    for k, axis in enumerate(axes):
        axis[k] = float(rows[1][k])
    torch.testing.assert_close(without_conflicts(axes), sum(axes, torch.zeros(5, dtype=torch.float64)))
