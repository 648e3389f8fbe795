"""The E-step's weights are the posterior that the method needs: on a toy where all trajectories can be counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.weighting import bound_of
from tests.theory.toy import (
    ALL,
    EVENLY,
    GOLD,
    WORDS,
    Agent,
    even_log_w,
    exact,
    log_w,
    random_theta,
    score,
    untrained,
    weighting_of,
)

seeds = st.integers(0, 2**31)
questions = st.integers(0, 1)


def by_trajectory(samples: Sequence[int], logs: np.ndarray) -> np.ndarray:
    """The sum of the samples' weights per trajectory, [Z]."""
    found = np.zeros(len(ALL))
    np.add.at(found, list(samples), np.exp(logs))
    return found


@exact
@given(seed=seeds, x=questions)
def test_posterior_weights_of_all_trajectories_are_the_posterior(seed: int, x: int) -> None:
    """w_k = r_k p(y|z_k) / sum_j r_j p(y|z_j), summed over samples as frequent as in q, is p(z|x,y) (Bayes)."""
    agent = Agent(random_theta(seed, 2.0))
    logs = even_log_w(agent, x, method="posterior")
    assert by_trajectory(EVENLY, logs) == pytest.approx(agent.posterior(x).numpy(), rel=1e-5, abs=1e-9)


@exact
@given(seed=seeds, x=questions)
def test_posterior_weights_of_the_models_own_samples_are_the_posterior(seed: int, x: int) -> None:
    """No ratio is needed where each trajectory is there as often as the model writes it."""
    theta = random_theta(seed, 2.0)
    # log (2, 4, 2) of 8 for the first token of each question; log (1, 3) and (1, 1) for the second.
    theta[: 2 * 3] = torch.tensor([2.0, 4.0, 2.0] * 2, dtype=torch.float64).log()
    theta[6 : 6 + 2 * 6] = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0, 1.0] * 2, dtype=torch.float64).log()
    samples = (0, 0, 1, 2, 2, 2, 3, 4)
    agent = Agent(theta)
    shares = [count / len(samples) for _, count in sorted(Counter(samples).items())]
    assert agent.log_trajectories(x).exp().tolist() == pytest.approx(shares)
    found = by_trajectory(samples, log_w(agent, x, samples, method="posterior"))
    assert found == pytest.approx(agent.posterior(x).numpy(), rel=1e-9, abs=1e-12)


@exact
@given(seed=seeds, x=questions, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_a_temperature_tempers_the_likelihood_and_nothing_else(seed: int, x: int, temperature: float) -> None:
    """Posterior weights are proportional to p(z|x) p(y|x,z)^(1/tau): the prior keeps its power."""
    agent = Agent(random_theta(seed))
    tempered = agent.log_trajectories(x) + agent.log_likelihoods(x, GOLD[x]) / temperature
    found = by_trajectory(EVENLY, even_log_w(agent, x, method="posterior", temperature=temperature))
    assert found == pytest.approx(tempered.softmax(0).numpy(), rel=1e-5)


@exact
@given(seed=seeds, x=questions)
def test_several_gold_answers_are_one_event(seed: int, x: int) -> None:
    """Weights are those of p(z | x, y in Y), Y being the set of the answers."""
    agent, golds = Agent(random_theta(seed)), (1, 3, 4)
    joint = torch.stack([agent.log_trajectories(x) + agent.log_likelihoods(x, y) for y in golds]).exp().sum(0)
    found = by_trajectory(EVENLY, even_log_w(agent, x, method="posterior", golds=golds))
    assert found == pytest.approx((joint / joint.sum()).numpy(), rel=1e-5)


@exact
@given(seed=seeds, x=questions, floor=st.sampled_from([1e-3, 0.1, 2.0]))
def test_a_floor_is_one_more_trajectory_of_that_likelihood(seed: int, x: int, floor: float) -> None:
    """Weights sum to S / (epsilon + S), S the sum of the likelihoods: a question that fails fades out, whatever K."""
    agent = Agent(random_theta(seed))
    likelihoods = agent.log_likelihoods(x, GOLD[x]).exp().numpy()
    found = np.exp(log_w(agent, x, ALL, method="posterior", floor=floor))
    assert found == pytest.approx(likelihoods / (likelihoods.sum() + floor))


@exact
@given(seed=seeds, x=questions)
def test_the_bound_of_samples_as_frequent_as_in_the_proposal_is_the_log_likelihood(seed: int, x: int) -> None:
    """log (1/K) sum_k r_k p(y|x,z_k)."""
    agent, config = Agent(random_theta(seed)), weighting_of(untrained(), method="posterior")
    found = bound_of(score(agent, x, EVENLY, config, by=untrained()), config)
    assert found == pytest.approx(agent.log_marginal(x).item(), rel=1e-5)


@exact
@given(seed=seeds, x=questions)
def test_likelihood_weights_average_to_the_likelihood_of_the_answer(seed: int, x: int) -> None:
    """(1/K) sum_k r_k p(y|x,z_k) over samples as frequent as in q is p(y|x): the evidence of importance sampling."""
    agent = Agent(random_theta(seed))
    found = np.exp(even_log_w(agent, x, method="likelihood")).mean()
    assert found == pytest.approx(agent.log_marginal(x).exp().item(), rel=1e-5)


@exact
@given(seed=seeds, x=questions, self_normalised=st.booleans())
def test_length_normalised_weights_are_tempered_by_the_length_of_the_answer(
    seed: int, x: int, self_normalised: bool
) -> None:
    """exp of the mean over |y| tokens is the likelihood at temperature |y|; divided by its sum, the posterior there."""
    agent = Agent(random_theta(seed))
    plain = even_log_w(agent, x, method="length_normalised", self_normalised=self_normalised)
    method = "posterior" if self_normalised else "likelihood"
    assert plain == pytest.approx(even_log_w(agent, x, method=method, temperature=float(len(WORDS[GOLD[x]]))))


@exact
@given(seed=seeds, x=questions)
def test_uniform_weights_are_the_models_own_trajectories(seed: int, x: int) -> None:
    """Their sum per trajectory is p(z|x): the average of a naive self-training."""
    agent = Agent(random_theta(seed))
    found = by_trajectory(EVENLY, even_log_w(agent, x, method="uniform"))
    assert found == pytest.approx(agent.log_trajectories(x).exp().numpy(), rel=1e-5)


# ---------------------------------------------------------------- another proposal than the model


@exact
@given(seed=seeds, x=questions, temperature=st.sampled_from([0.5, 0.8, 1.5]))
def test_ratios_make_the_samples_of_a_tempered_proposal_unbiased(
    seed: int, x: int, temperature: float
) -> None:
    """E_q[r(z) p(y|x,z)] = p(y|x) where nothing is clipped, q having all logits divided by a temperature."""
    theta = random_theta(seed)
    agent, proposal = Agent(theta), Agent(theta, temperature)
    q = proposal.log_trajectories(x).exp().numpy()
    found = np.exp(log_w(agent, x, ALL, by=proposal, method="likelihood"))
    assert q @ found == pytest.approx(agent.log_marginal(x).exp().item(), rel=1e-5)


def test_without_ratios_the_same_samples_are_biased() -> None:
    theta = random_theta(3, 1.5)
    agent, proposal = Agent(theta), Agent(theta, 0.5)
    q = proposal.log_trajectories(0).exp().numpy()
    biased = q @ np.exp(log_w(agent, 0, ALL, by=proposal, method="likelihood", correct_proposal=False))
    assert abs(biased / agent.log_marginal(0).exp().item() - 1) > 0.05


@exact
@given(seed=seeds, x=questions, most=st.sampled_from([1.0, 1.2, 2.0]))
def test_clipped_ratios_never_promise_more_than_the_likelihood(seed: int, x: int, most: float) -> None:
    """E_q[min(r, c) p(y|x,z)] = sum_z min(p, c q) p(y|x,z), at most p(y|x): the bound stays one."""
    theta = random_theta(seed, 2.0)
    agent, proposal = Agent(theta), Agent(theta, 0.6)
    p, q = (of.log_trajectories(x).exp().numpy() for of in (agent, proposal))
    likelihoods = agent.log_likelihoods(x, GOLD[x]).exp().numpy()
    found = q @ np.exp(log_w(agent, x, ALL, by=proposal, method="likelihood", max_ratio=most))
    assert found == pytest.approx(np.minimum(p, most * q) @ likelihoods, rel=1e-5)
    assert found <= agent.log_marginal(x).exp().item() * (1 + 1e-5)


@exact
@given(seed=seeds, x=questions, temperature=st.sampled_from([0.5, 1.5]))
def test_the_expected_metric_is_over_the_own_answer_too(seed: int, x: int, temperature: float) -> None:
    """E_q[r(z,y) R(y)] = E_p[R]: with `reward` the ratio has the tokens of the sampled answer in it."""
    theta = random_theta(seed)
    agent, proposal = Agent(theta), Agent(theta, temperature)
    rewards = [0.0, 1.0, 0.25, 0.5, 0.0]
    every = [(z, y) for z in ALL for y in ALL]
    q = np.exp([joint(proposal, x, z, y) for z, y in every])
    expected = sum(math.exp(joint(agent, x, z, y)) * rewards[y] for z, y in every)
    found = np.exp(log_w(agent, x, every, by=proposal, method="reward", rewards=rewards))
    assert q @ found == pytest.approx(expected, rel=1e-5)


def joint(agent: Agent, x: int, z: int, y: int) -> float:
    """log p(z, y | x)."""
    return float(agent.log_trajectories(x)[z] + agent.log_likelihoods(x, y)[z])


# ---------------------------------------------------------------- the toy itself


def test_the_toy_is_a_distribution_and_its_even_sample_is_exact() -> None:
    agent = Agent(random_theta(1, 3.0))
    assert sum(agent.log_marginal(0, y).exp().item() for y in ALL) == pytest.approx(1)
    assert agent.posterior(1).sum().item() == pytest.approx(1)
    shares = [EVENLY.count(z) / len(EVENLY) for z in ALL]
    assert untrained().log_trajectories(0).exp().tolist() == pytest.approx(shares)
