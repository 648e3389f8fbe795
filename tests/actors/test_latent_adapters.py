"""Latent tasks on real DeepSpeed ranks: value and gradient against a plain formula in which every example has its own
weights, and what becomes of the increments in optimiser, checkpoint and exported model.

The released program hangs its increments on the trainer: no optimiser knows them, and they stay 0 for ever.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actors.learner import Learner
from pipeline.core.config import LoraConfig
from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import LatentTasks, gates_of, streams_of
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.records import Example
from tests.actors.ranks import (
    CONFIG,
    LONGEST,
    Weights,
    assert_same_weights,
    build_model,
    make_examples,
    nll_of,
    run_ranks,
    weights_of,
)

pytestmark = pytest.mark.component

LATENT = LatentTasks(tasks=3, rank=2)
GATES = ([2.0, 0.5, 0.0], [0.0, 1.5, 1.5], [0.25, 0.0, 3.0])
ONE_STEP = CONFIG.model_copy(
    update={"batch_size": 100, "gradient_clipping": 0.0, "tokens_per_microbatch": 2 * LONGEST, "epochs": 1}
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("latent") / "model")


def gated_examples(count: int = 12) -> list[Example]:
    return [
        replace(example, streams={**example.streams, **streams_of(np.array(GATES[k % 3]))})
        for k, example in enumerate(make_examples(count))
    ]


def increments(model: Any) -> dict[str, tuple[Any, Any]]:
    """A and B of every output projection, under the name of its weight."""
    return {
        f"{name}.weight": (module.lora_A["latent"].weight, module.lora_B["latent"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "latent" in module.lora_A
    }


def gradients_of_a_step(
    learner: Learner, examples: list[Example]
) -> tuple[float, Weights, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Value and gradients with increments that are not 0, and these."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, b in increments(learner.model).values():
            b.copy_(torch.randn(b.shape, generator=generator))
    there = {
        name: (a.detach().numpy().copy(), b.detach().numpy().copy())
        for name, (a, b) in increments(learner.model).items()
    }
    found: Weights = {}
    step = learner.engine.step

    def capture() -> None:
        for name, parameter in learner.model.named_parameters():
            found[name] = parameter.grad.float().numpy().copy()
        step()

    learner.engine.step = capture
    report = learner.train(examples, nll_of(learner), phase_seed=0, learning_rate=1e-30)
    return report.history[0]["loss"], found, there


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"attention": "eager"}])
def test_every_example_is_computed_with_weights_of_its_own(
    model_path: Path, num_ranks: int, changes: dict[str, Any]
) -> None:
    examples = gated_examples()
    config = ONE_STEP.model_copy(update={"num_ranks": num_ranks, **changes})
    value, gradients, there = run_ranks(config, model_path, gradients_of_a_step, examples, latent=LATENT)

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    ab = {
        name: tuple(torch.from_numpy(one).clone().requires_grad_() for one in both)
        for name, both in there.items()
    }
    own = dict(model.named_parameters())
    n = [example.num_targets for example in examples]
    w = [float(np.exp(example.number("log_weight"))) for example in examples]
    total = torch.zeros(())
    for example, weight in zip(examples, w, strict=True):
        gates = torch.from_numpy(gates_of(example.streams, 3)).repeat_interleave(2)
        changed = {name: own[name] + (b * gates) @ a / 3 for name, (a, b) in ab.items()}
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        logits = torch.func.functional_call(model, {**own, **changed}, (ids[None],)).logits[0]
        targets = np.flatnonzero(example.loss_mask)
        targets = torch.from_numpy(targets[targets > 0])
        logprobs = logits[targets - 1].log_softmax(-1).gather(1, ids[targets][:, None])
        total = total - weight * logprobs.sum()
    total = total / sum(a * b for a, b in zip(w, n, strict=True))
    total.backward()  # type: ignore[no-untyped-call]

    assert value == pytest.approx(float(total), rel=1e-5)
    for name, (a, b) in ab.items():
        module = name.removesuffix(".weight")
        assert a.grad is not None and b.grad is not None and bool(a.grad.abs().max() > 1e-4)
        np.testing.assert_allclose(gradients[f"{module}.lora_A.latent.weight"], a.grad, atol=2e-5)
        np.testing.assert_allclose(gradients[f"{module}.lora_B.latent.weight"], b.grad, atol=2e-5)
    for name, parameter in own.items():
        there_name = name.replace("o_proj.weight", "o_proj.base_layer.weight")
        np.testing.assert_allclose(gradients[there_name], parameter.grad, atol=2e-5, err_msg=name)


def trained(learner: Learner, examples: list[Example], path: Path) -> tuple[Weights, dict[int, float]]:
    """What is pushed, and how large each latent task's B is, where a rank has all of it."""
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.save(path / "state", path / "model")
    sizes: dict[int, float] = {}
    if learner.zero_stage < 3:
        for _, b in increments(learner.model).values():
            for task, columns in enumerate(b.detach().split(LATENT.rank, dim=1)):
                sizes[task] = sizes.get(task, 0.0) + float(columns.abs().sum())
    return weights_of(learner), sizes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_ranks": 2, "zero_stage": 1},
        {"num_ranks": 2, "zero_stage": 2},
        {"num_ranks": 2, "zero_stage": 3},
    ],
    ids=["stage 0", "stage 1", "stage 2", "stage 3"],
)
def test_increments_are_in_the_optimiser_and_in_the_model_that_is_exported(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=changes)
    weights, sizes = run_ranks(config, model_path, trained, gated_examples(), tmp_path, latent=LATENT)
    plain, _ = run_ranks(CONFIG, model_path, trained, make_examples(), tmp_path / "plain")
    if sizes:
        assert min(sizes.values()) > 0.01
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    assert weights.keys() == dict(original.named_parameters()).keys()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_weights({n: p.detach().numpy() for n, p in opened.named_parameters()}, weights, atol=0)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert float(np.abs(weights[name] - plain[name]).max()) > 1e-3
    alone, _ = run_ranks(CONFIG, model_path, trained, gated_examples(), tmp_path / "one", latent=LATENT)
    assert_same_weights(weights, alone, atol=1e-5)


def test_a_task_whose_gates_are_closed_learns_nothing(model_path: Path, tmp_path: Path) -> None:
    """So the cold start, whose examples have no gates, leaves the increments at 0."""
    closed = [
        replace(e, streams={**e.streams, **streams_of(np.array([1.0, 0.0, 2.0]))}) for e in make_examples()
    ]
    _, sizes = run_ranks(CONFIG, model_path, trained, closed, tmp_path, latent=LATENT)
    assert sizes[1] == 0 < min(sizes[0], sizes[2])
    weights, sizes = run_ranks(CONFIG, model_path, trained, make_examples(), tmp_path / "a", latent=LATENT)
    assert set(sizes.values()) == {0}
    plain, _ = run_ranks(CONFIG, model_path, trained, make_examples(), tmp_path / "b")
    assert_same_weights(weights, plain)


def served_logits(learner: Learner, examples: list[Example], path: Path) -> Weights:
    """Of the model that was exported, and of the live one with all gates at their mean."""
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.export(path)
    assert learner.latent is not None
    ids = torch.arange(20)[None]
    learner.model.eval()
    learner.latent.open(torch.ones(20, LATENT.tasks))
    with torch.no_grad():
        logits = learner.model(input_ids=ids, position_ids=ids, segment_lengths=(20,), use_cache=False).logits
    names = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    return {"logits": logits.numpy(), "lora": np.array([all(".lora_" in name for name in names)])}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8.0)])
def test_what_is_exported_computes_as_with_all_gates_at_their_mean(
    model_path: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    config = CONFIG.model_copy(update={"lora": lora})
    live = run_ranks(config, model_path, served_logits, gated_examples(), tmp_path / "model", latent=LATENT)
    assert bool(live["lora"][0]) == (lora is not None)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = opened(torch.arange(20)[None]).logits.detach().numpy()
    np.testing.assert_allclose(found, live["logits"], atol=1e-5)


def go_on(learner: Learner, examples: list[Example], path: Path) -> Weights:
    learner.load(path / "state")
    learner.train(examples, nll_of(learner), phase_seed=2)
    return weights_of(learner)


def straight_on(learner: Learner, examples: list[Example], path: Path) -> Weights:
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.save(path / "state")
    learner.train(examples, nll_of(learner), phase_seed=2)
    return weights_of(learner)


def test_a_checkpoint_has_the_increments_and_their_moments(model_path: Path, tmp_path: Path) -> None:
    examples = gated_examples()
    expected = run_ranks(CONFIG, model_path, straight_on, examples, tmp_path, latent=LATENT)
    found = run_ranks(CONFIG, model_path, go_on, examples, tmp_path, latent=LATENT)
    assert_same_weights(found, expected, atol=0)
    with pytest.raises(UserError, match="has other trained parameters"):
        run_ranks(CONFIG, model_path, go_on, make_examples(), tmp_path)


@pytest.mark.parametrize("project", [False, True])
def test_flashbacks_and_new_examples_train_the_same_increments(
    model_path: Path, tmp_path: Path, project: bool
) -> None:
    """Under a joint loss whose reference has no increments."""
    examples = [replace(e, role="old" if k % 2 else "new") for k, e in enumerate(gated_examples())]
    loss = Joint((Part("new", WeightedNll()), Part("old", Divergence("symmetric", str(model_path)))), project)
    history = run_ranks(CONFIG, model_path, steps_of, examples, loss, latent=LATENT)
    assert history[0]["old/kl"] == pytest.approx(0, abs=1e-5)  # B is 0 at first
    assert history[-1]["old/kl"] > 1e-4
    assert all(("conflicts" in step) == project for step in history)


def steps_of(learner: Learner, examples: list[Example], loss: Joint) -> list[dict[str, float]]:
    return list(learner.train(examples, loss, phase_seed=1).history)


def test_gates_for_tasks_that_the_model_has_not_are_refused_before_any_training(model_path: Path) -> None:
    message = "q0/0 was made for at least 2 latent tasks, and the model has 0"
    with pytest.raises(UserError, match=message):
        run_ranks(CONFIG, model_path, go_nowhere, gated_examples())


def go_nowhere(learner: Learner, examples: list[Example]) -> None:
    learner.train(examples, nll_of(learner), phase_seed=1)
