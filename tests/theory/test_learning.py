"""The M-step climbs what it should: gradients of the project's weighted loss, and EM's guarantee, on the toy.

What holds, for samples as frequent as in the proposal, so that sums over them are exact (F for the M-step's surrogate,
sum_k w_k log p(z_k, y | x; theta), and theta_t for the parameters that sampled and weighted):

- `posterior`. sum_x log p(y|x; theta) gains F(theta) - F(theta_t) and sum_x KL(p_t(z|x,y) || p(z|x,y; theta)). A
  divergence is at least 0: it never gains less than the surrogate (EXSEARCH, Lemma 3.1).
- `likelihood`. The surrogate is the sum over x of p_t(y|x) times that of `posterior`. As u >= 1 + log u,

      sum_x p(y|x; theta) - p_t(y|x) >= sum_x p_t(y|x) log(p(y|x; theta) / p_t(y|x)) >= F(theta) - F(theta_t),

  so it never lowers sum_x p(y|x), the expected likelihood of a question drawn at random. It may lower sum_x log p(y|x),
  and a single question: hard ones count little.
- Both need one gold answer. Of several, one is trained with the weight of them all, and the rest of the bound is lost.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.losses.likelihood import iteration_weights
from tests.theory.toy import (
    ALL,
    EVENLY,
    GOLD,
    OF_TRAJECTORIES,
    QUESTIONS,
    SIZE,
    Agent,
    MStep,
    even_m_step,
    exact,
    gradient,
    log_w,
    pairs,
    random_theta,
    untrained,
)

few = settings(exact, max_examples=8)
seeds = st.integers(0, 2**31)
ROUNDING = 1e-4
"""Of log-probabilities in float32, by which records are weighted."""


def leaf(seed: int) -> Tensor:
    return random_theta(seed).requires_grad_()


def log_marginals(theta: Tensor) -> Tensor:
    """[X]."""
    agent = Agent(theta)
    return torch.stack([agent.log_marginal(x) for x in range(QUESTIONS)])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- gradients


@exact
@given(seed=seeds)
def test_likelihood_weights_climb_the_sum_of_likelihoods(seed: int) -> None:
    """(1/K) sum_k w_k grad log p(z_k, y | x) = grad sum_x p(y|x) at theta_t."""
    theta = leaf(seed)
    step = even_m_step(Agent(theta.detach()), method="likelihood")
    assert_same(step.ascent(theta.detach()) / len(EVENLY), gradient(log_marginals(theta).exp().sum(), theta))


@exact
@given(seed=seeds)
def test_likelihood_weights_are_a_policy_gradient_and_a_term_for_the_answer(seed: int) -> None:
    """grad E_z[R(z)] for R(z) = p(y|x,z): E_z[R(z) grad log p(z|x)], REINFORCE with the likelihood as its reward, and
    E_z[grad R(z)], which a fixed reward would not have. The loss has both; in what writes trajectories the first alone.
    """
    theta = leaf(seed)
    agent = Agent(theta)
    reinforce, answer = torch.zeros(()), torch.zeros(())
    for x in range(QUESTIONS):
        log_p, rewards = agent.log_trajectories(x), agent.log_likelihoods(x, GOLD[x]).exp()
        reinforce = reinforce + (log_p.detach().exp() * rewards.detach() * log_p).sum()
        answer = answer + (log_p.detach().exp() * rewards).sum()
    policy_gradient, of_answer = gradient(reinforce, theta), gradient(answer, theta)

    found = even_m_step(Agent(theta.detach()), method="likelihood").ascent(theta.detach()) / len(EVENLY)
    assert_same(found, policy_gradient + of_answer)
    assert_same(found[:OF_TRAJECTORIES], policy_gradient[:OF_TRAJECTORIES])
    assert_same(found[OF_TRAJECTORIES:], of_answer[OF_TRAJECTORIES:])


@exact
@given(seed=seeds, temperature=st.sampled_from([0.5, 2.0]))
def test_a_temperature_makes_a_power_of_the_likelihood_the_reward(seed: int, temperature: float) -> None:
    """In what writes trajectories: grad E_z[p(y|x,z)^(1/tau)]."""
    theta = leaf(seed)
    agent = Agent(theta)
    expected = sum(
        (
            agent.log_trajectories(x).exp() * (agent.log_likelihoods(x, GOLD[x]).detach() / temperature).exp()
        ).sum()
        for x in range(QUESTIONS)
    )
    step = even_m_step(Agent(theta.detach()), method="likelihood", temperature=temperature)
    found = step.ascent(theta.detach())[:OF_TRAJECTORIES] / len(EVENLY)
    assert_same(found, gradient(expected, theta)[:OF_TRAJECTORIES])


@exact
@given(seed=seeds)
def test_posterior_weights_climb_the_sum_of_log_likelihoods(seed: int) -> None:
    """sum_k w_k grad log p(z_k, y | x) = grad sum_x log p(y|x) at theta_t (Fisher's identity)."""
    theta = leaf(seed)
    step = even_m_step(Agent(theta.detach()), method="posterior")
    assert_same(step.ascent(theta.detach()), gradient(log_marginals(theta).sum(), theta))


@exact
@given(seed=seeds)
def test_rewards_climb_the_expected_metric(seed: int) -> None:
    """(1/K) sum_k w_k grad log p(z_k, y_k | x) = grad E_{z,y}[R(y)]: own answers are trained, and are in the ratio."""
    theta, rewards = leaf(seed), [0.0, 1.0, 0.25, 0.5, 0.0]
    agent, samples = Agent(theta.detach()), pairs()
    logs = [
        w
        for x in range(QUESTIONS)
        for w in log_w(agent, x, samples, by=untrained(), method="reward", rewards=rewards)
    ]
    step = MStep([(x, z, y) for x in range(QUESTIONS) for z, y in samples], logs)
    metric = sum(rewards[y] * Agent(theta).log_marginal(x, y).exp() for x in range(QUESTIONS) for y in ALL)
    assert_same(step.ascent(theta.detach()) / len(samples), gradient(metric, theta))


@exact
@given(seed=seeds)
def test_uniform_weights_teach_nothing_of_how_to_search(seed: int) -> None:
    """E_z[grad log p(z|x)] = 0: without weights only answering is learnt, E_z[grad log p(y|x,z)]."""
    theta = leaf(seed)
    agent = Agent(theta)
    found = even_m_step(Agent(theta.detach()), method="uniform").ascent(theta.detach())
    answer = sum(
        (agent.log_trajectories(x).detach().exp() * agent.log_likelihoods(x, GOLD[x])).sum()
        for x in range(QUESTIONS)
    )
    assert_same(found[:OF_TRAJECTORIES], torch.zeros(OF_TRAJECTORIES))
    assert_same(found, gradient(answer, theta))


@exact
@given(seed=seeds)
def test_a_token_has_weight_one_on_average(seed: int) -> None:
    """The loss divides weights by their average over the iteration's tokens: the step's length does not depend on how
    likely answers are, and a trajectory counts by its weight times its length, not by its weight alone."""
    step = even_m_step(Agent(random_theta(seed)), method="likelihood")
    tokens = [example.num_targets for example in step.examples]
    v = iteration_weights([example.number("log_weight") for example in step.examples], tokens)
    assert sum(a * n for a, n in zip(v, tokens, strict=True)) == pytest.approx(sum(tokens))
    nll = [-one.sum().item() for one in torch.split(untrained().log_p[step.targets], tokens)]
    assert step.loss(torch.zeros(SIZE, dtype=torch.float64)).item() == pytest.approx(
        sum(a * of_one for a, of_one in zip(v, nll, strict=True)) / sum(tokens)
    )


# ---------------------------------------------------------------- EM

moves = st.sampled_from([0.05, 0.3, 1.0, 3.0])


@exact
@given(seed=seeds, to=seeds, size=moves)
def test_what_the_surrogate_gains_the_log_likelihood_gains_at_least(seed: int, to: int, size: float) -> None:
    theta = random_theta(seed)
    step, moved = even_m_step(Agent(theta), method="posterior"), theta + random_theta(to, size)
    gained = (log_marginals(moved) - log_marginals(theta)).sum().item()
    assert gained >= step.surrogate(moved) - step.surrogate(theta) - ROUNDING


@exact
@given(seed=seeds, to=seeds, size=moves)
def test_what_is_gained_beyond_the_surrogate_is_the_divergence_of_the_posteriors(
    seed: int, to: int, size: float
) -> None:
    theta = random_theta(seed)
    step, moved = even_m_step(Agent(theta), method="posterior"), theta + random_theta(to, size)
    divergence = sum(
        (before * (before.log() - Agent(moved).posterior(x).log())).sum().item()
        for x in range(QUESTIONS)
        for before in [Agent(theta).posterior(x)]
    )
    gained = (log_marginals(moved) - log_marginals(theta)).sum().item()
    surrogate = step.surrogate(moved) - step.surrogate(theta)
    assert gained == pytest.approx(surrogate + divergence, rel=1e-4, abs=ROUNDING)


@exact
@given(seed=seeds, to=seeds, size=moves)
def test_what_the_surrogate_of_likelihoods_gains_their_sum_gains_at_least(
    seed: int, to: int, size: float
) -> None:
    theta = random_theta(seed)
    step, moved = even_m_step(Agent(theta), method="likelihood"), theta + random_theta(to, size)
    before, after = log_marginals(theta), log_marginals(moved)
    weighted = (before.exp() * (after - before)).sum().item()
    surrogate = (step.surrogate(moved) - step.surrogate(theta)) / len(EVENLY)
    assert (after.exp() - before.exp()).sum().item() >= weighted - ROUNDING
    assert weighted >= surrogate - ROUNDING


@few
@given(seed=seeds)
def test_em_with_posterior_weights_never_lowers_the_log_likelihood(seed: int) -> None:
    values = [log_marginals(theta).sum().item() for theta in iterations(random_theta(seed, 2.0), "posterior")]
    assert all(after >= before - ROUNDING for before, after in pairwise(values))
    assert values[-1] > values[0]


@few
@given(seed=seeds)
def test_em_with_likelihood_weights_never_lowers_the_sum_of_likelihoods(seed: int) -> None:
    thetas = iterations(random_theta(seed, 2.0), "likelihood")
    values = [log_marginals(theta).exp().sum().item() for theta in thetas]
    assert all(after >= before - ROUNDING for before, after in pairwise(values))
    assert values[-1] > values[0]


def iterations(theta: Tensor, method: str, number: int = 3, inner: int = 3) -> list[Tensor]:
    """theta_0, theta_1, ...: each M-step takes some gradient steps that lower the project's loss."""
    thetas = [theta]
    for _ in range(number):
        step = even_m_step(Agent(theta), method=method)
        for _ in range(inner):
            theta = downhill(step, theta)
        thetas.append(theta)
    return thetas


def downhill(step: MStep, theta: Tensor) -> Tensor:
    """As far along the gradient as lowers the loss; not at all if nothing does."""
    direction, loss = step.ascent(theta) / step.weight, step.loss(theta)
    for halvings in range(-4, 12):
        moved = theta + direction / 2**halvings
        if step.loss(moved) < loss:
            return moved
    return theta
