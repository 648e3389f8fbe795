"""Losses of the other heads on real DeepSpeed ranks: plain formulas, and checkpoints to go on from."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actors.learner import Learner
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.contrastive import InfoNce
from pipeline.core.losses.loss import Loss
from pipeline.core.losses.policy_gradient import ClippedValue
from pipeline.core.policies import Head
from pipeline.core.records import Example
from tests.actors.encoders import ENCODER_CONFIG, build_encoder, homes
from tests.actors.ranks import (
    AFTER_EACH_STEP,
    CONFIG,
    LONGEST,
    Result,
    Weights,
    assert_same_weights,
    build_model,
    make_examples,
    run_ranks,
    train,
    values_and_gradients,
)

pytestmark = pytest.mark.component

CLIP, TEMPERATURE = 0.2, 0.5
Expected = tuple[float, Weights]


def in_one_step(config: LearnerConfig, **changes: Any) -> LearnerConfig:
    return config.model_copy(update={"batch_size": 100, "gradient_clipping": 0.0, **changes})


def assert_same(found: Expected, expected: Expected) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-6, rel=1e-6)
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- values


def critic_examples() -> list[Example]:
    random = np.random.default_rng(5)
    examples = []
    for example in make_examples():
        size = len(example.token_ids)
        streams = {"return": random.normal(size=size), "old_value": 0.3 * random.normal(size=size)}
        fields = (example.id, example.unit, "critic", example.token_ids, example.loss_mask)
        examples.append(Example(*fields, streams))
    return examples


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose value head is not drawn anew by whoever opens it."""
    path = tmp_path_factory.mktemp("critic")
    shape = transformers.AutoConfig.from_pretrained(build_model(path), num_labels=1, classifier_dropout=0.0)
    torch.manual_seed(2)
    transformers.AutoModelForTokenClassification.from_config(shape).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected_of_critic(critic: Path) -> Expected:
    """The clipped value loss by its formula, one example at a time."""
    network = transformers.AutoModelForTokenClassification.from_pretrained(critic, dtype=torch.float32)
    errors = []
    for example in critic_examples():
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        mask = torch.from_numpy(example.loss_mask[1:])
        target, old = (
            torch.from_numpy(example.streams[name][1:]).float()[mask] for name in ("return", "old_value")
        )
        value = network(ids[None]).logits[0, :-1, 0][mask]
        near = torch.minimum(torch.maximum(value, old - CLIP), old + CLIP)
        errors.append(torch.maximum((value - target) ** 2, (near - target) ** 2))
    loss = torch.cat(errors).mean() / 2
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in network.named_parameters()}


RANKS_AND_STAGES = [(ranks, stage) for ranks in (1, 2) for stage in range(4)]


@pytest.mark.parametrize(("num_ranks", "zero_stage"), RANKS_AND_STAGES)
def test_the_value_loss_is_that_of_the_formula(
    critic: Path, expected_of_critic: Expected, num_ranks: int, zero_stage: int
) -> None:
    for budget in (LONGEST, 1000):
        config = in_one_step(CONFIG, num_ranks=num_ranks, zero_stage=zero_stage, tokens_per_microbatch=budget)
        losses: dict[str, Loss] = {"value": ClippedValue(CLIP)}
        found = run_ranks(config, critic, values_and_gradients, critic_examples(), losses, head="value")
        assert_same(found["value"], expected_of_critic)


# ---------------------------------------------------------------- embeddings


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


def units_of_people(encoder: Path) -> list[Example]:
    """Four units of two people and their towns."""
    examples = homes(transformers.AutoTokenizer.from_pretrained(encoder))
    return [
        Example(e.id, f"unit {k // 4}", e.role, e.token_ids, e.loss_mask, e.streams)
        for k, e in enumerate(examples)
    ]


@pytest.fixture(scope="module")
def expected_of_encoder(encoder: Path) -> Expected:
    """InfoNCE as a cross-entropy of cosines, one text at a time."""
    from sentence_transformers import SentenceTransformer

    network = SentenceTransformer(str(encoder), device="cpu")
    vectors = []
    for example in units_of_people(encoder):
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        vectors.append(
            network({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"][0]
        )
    unit = torch.stack(vectors) / torch.stack(vectors).norm(dim=-1, keepdim=True)
    terms = []
    for first in range(0, len(unit), 4):
        queries, passages = unit[first : first + 4 : 2], unit[first + 1 : first + 4 : 2]
        exps = torch.exp(queries @ passages.T / TEMPERATURE)
        terms.append(-torch.log(exps.diagonal() / exps.sum(-1)))
    loss = torch.cat(terms).mean()
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize(("num_ranks", "zero_stage"), RANKS_AND_STAGES)
def test_the_contrastive_loss_is_that_of_the_formula(
    encoder: Path, expected_of_encoder: Expected, num_ranks: int, zero_stage: int
) -> None:
    for budget in (12, 1000):
        config = in_one_step(
            ENCODER_CONFIG, num_ranks=num_ranks, zero_stage=zero_stage, tokens_per_microbatch=budget
        )
        losses: dict[str, Loss] = {"nce": InfoNce(TEMPERATURE)}
        examples = units_of_people(encoder)
        found = run_ranks(config, encoder, values_and_gradients, examples, losses, head="embedding")
        assert_same(found["nce"], expected_of_encoder)


# ---------------------------------------------------------------- checkpoints


def train_until_killed(learner: Learner, examples: Sequence[Example], loss: Loss, path: Path) -> None:
    """Saves after each step and dies in step 3."""

    def die(_: dict[str, float]) -> None:
        if learner.progress()["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(examples, loss, phase_seed=1, checkpoints=path, on_step=die)


def go_on(learner: Learner, examples: list[Example], loss: Loss, path: Path) -> Result:
    learner.load(path)
    return train(learner, examples, loss)


@pytest.mark.parametrize("head", ["value", "embedding"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="stage 0"),
        pytest.param({"num_ranks": 2, "zero_stage": 3}, id="stage 3", marks=pytest.mark.chaos),
    ],
)
def test_a_killed_learner_of_any_head_goes_on_as_if_nothing_had_happened(
    critic: Path, encoder: Path, tmp_path: Path, head: Head, changes: dict[str, Any]
) -> None:
    loss: Loss = ClippedValue() if head == "value" else InfoNce()
    model = critic if head == "value" else encoder
    examples = critic_examples() if head == "value" else units_of_people(encoder)
    base = CONFIG if head == "value" else ENCODER_CONFIG.model_copy(update={"batch_size": 4, "epochs": 2})
    config = base.model_copy(update={"checkpoint_minutes": AFTER_EACH_STEP, **changes})
    assert run_ranks(config, model, train_until_killed, examples, loss, tmp_path, head=head) is None
    resumed = run_ranks(config, model, go_on, examples, loss, tmp_path, head=head)
    undisturbed = run_ranks(config, model, train, examples, loss, head=head)
    assert resumed[0].history == undisturbed[0].history
    assert_same_weights(resumed[1], undisturbed[1], atol=0)
