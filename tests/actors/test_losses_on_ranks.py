"""Every loss on real DeepSpeed ranks against a plain torch formula over single examples: one value and one gradient,
for any number of ranks, ZeRO stage and packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actors.learner import Learner
from pipeline.core.copies import merge_copies
from pipeline.core.errors import UserError
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Loss
from pipeline.core.losses.policy_gradient import ClippedRatio
from pipeline.core.losses.preference import Cpo, Dpo, SimPo
from pipeline.core.records import Example
from tests.actors.ranks import (
    CONFIG,
    LONGEST,
    VOCABULARY,
    Weights,
    build_model,
    make_examples,
    run_ranks,
    values_and_gradients,
    weight_of,
)

pytestmark = pytest.mark.component

Formula = Callable[[torch.Tensor, Example], torch.Tensor]
"""(log-probabilities [targets, V] of one example, the example) -> its share, before the mean."""

BETA, GAMMA, CLIP, CLIP_HIGH, KL = 0.3, 0.5, 0.2, 0.28, 0.1


def examples_with_streams() -> list[Example]:
    """Six pairs whose streams serve every loss."""
    random = np.random.default_rng(3)
    made = []
    for k, example in enumerate(make_examples()):
        tokens, targets = len(example.token_ids), example.num_targets
        streams = {
            "log_weight": example.streams["log_weight"],
            "credit": random.random(tokens),
            "label": np.array([1.0 if k % 2 == 0 else -1.0]),
            "reference_logprob": -4 + 0.3 * random.normal(size=1),
            "advantage": random.normal(size=tokens),
            "old_logprob": -4 + 0.3 * random.normal(size=tokens),
            "reference_logits": random.normal(size=(targets, VOCABULARY)),
        }
        made.append(replace(example, unit=f"pair {k // 2}", streams=streams))
    return made


def per_token(example: Example, stream: str) -> torch.Tensor:
    mask = np.flatnonzero(example.loss_mask)
    return torch.from_numpy(example.streams[stream][mask[mask > 0]].astype(np.float32))


def picked(logprobs: torch.Tensor, example: Example) -> torch.Tensor:
    mask = np.flatnonzero(example.loss_mask)
    ids = torch.from_numpy(example.token_ids[mask[mask > 0]].astype(np.int64))
    return logprobs.gather(1, ids[:, None])[:, 0]


def nll(tables: list[torch.Tensor], examples: list[Example], *, by_token: bool = False) -> torch.Tensor:
    n = [example.num_targets for example in examples]
    w = [weight_of(example) for example in examples]
    scale = sum(n) / sum(a * b for a, b in zip(w, n, strict=True))
    total = torch.zeros(())
    for weight, table, example in zip(w, tables, examples, strict=True):
        credit = per_token(example, "credit") if by_token else 1.0
        total = total + scale * weight * (credit * picked(table, example)).sum()
    return -total / sum(n)


def pairs(
    margin: Callable[[list[torch.Tensor], list[Example]], torch.Tensor], nll_coefficient: float = 0.0
) -> Any:
    def loss(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
        terms = []
        for first in range(0, len(examples), 2):
            of_pair = [picked(t, e) for t, e in zip(tables[first:][:2], examples[first:][:2], strict=True)]
            terms.append(torch.log(1 + torch.exp(-margin(of_pair, examples[first:][:2]))))
            terms[-1] = terms[-1] - nll_coefficient * of_pair[0].mean()
        return torch.stack(terms).mean()

    return loss


def dpo_margin(of_pair: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    ratios = [x.sum() - e.number("reference_logprob") for x, e in zip(of_pair, examples, strict=True)]
    return BETA * (ratios[0] - ratios[1])


def clipped_tokens(tables: list[torch.Tensor], examples: list[Example]) -> list[torch.Tensor]:
    terms = []
    for table, example in zip(tables, examples, strict=True):
        logprobs, advantage = picked(table, example), per_token(example, "advantage")
        ratio = torch.exp(logprobs - per_token(example, "old_logprob"))
        bounded = torch.clip(ratio, 1 - CLIP, 1 + CLIP_HIGH)
        terms.append(-torch.minimum(ratio * advantage, bounded * advantage))
    return terms


def clipped(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    return torch.cat(clipped_tokens(tables, examples)).mean()


def clipped_by_sequence(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    return torch.stack([tokens.mean() for tokens in clipped_tokens(tables, examples)]).mean()


def clipped_by_group(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    """Groups are the pairs."""
    tokens = clipped_tokens(tables, examples)
    return torch.stack([torch.cat(tokens[first:][:2]).mean() for first in range(0, len(tokens), 2)]).mean()


def clipped_with_kl(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    kl = []
    for table, example in zip(tables, examples, strict=True):
        ratio = example.number("reference_logprob") - picked(table, example)
        kl.append(torch.exp(ratio) - ratio - 1)
    return clipped(tables, examples) + KL * torch.cat(kl).mean()


def divergence(direction: str) -> Any:
    def loss(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
        terms = []
        for p, example in zip(tables, examples, strict=True):
            q = torch.from_numpy(example.streams["reference_logits"].astype(np.float32)).log_softmax(-1)
            forward = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
            reverse = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            terms.append({"forward": forward, "reverse": reverse}.get(direction, (forward + reverse) / 2))
        return torch.cat(terms).mean()

    return loss


LOSSES: dict[str, tuple[Loss, Any]] = {
    "nll": (WeightedNll(), nll),
    "nll by token": (WeightedNll(by_token=True), partial(nll, by_token=True)),
    "dpo": (Dpo(BETA), pairs(dpo_margin)),
    "dpo with nll": (Dpo(BETA, nll_coefficient=0.5), pairs(dpo_margin, 0.5)),
    "cpo": (Cpo(BETA), pairs(lambda x, _: BETA * (x[0].sum() - x[1].sum()), 1.0)),
    "simpo": (SimPo(BETA, gamma=GAMMA), pairs(lambda x, _: BETA * (x[0].mean() - x[1].mean()) - GAMMA)),
    "clipped ratio": (ClippedRatio(CLIP, CLIP_HIGH), clipped),
    "clipped ratio with kl": (ClippedRatio(CLIP, CLIP_HIGH, KL), clipped_with_kl),
    "clipped ratio by sequence": (ClippedRatio(CLIP, CLIP_HIGH, mean_over="sequence"), clipped_by_sequence),
    "clipped ratio by group": (ClippedRatio(CLIP, CLIP_HIGH, mean_over="group"), clipped_by_group),
    "forward kl": (Divergence("forward"), divergence("forward")),
    "reverse kl": (Divergence("reverse"), divergence("reverse")),
    "symmetric kl": (Divergence("symmetric"), divergence("symmetric")),
}


def plain(model: Path, formula: Any, examples: Sequence[Example]) -> tuple[float, Weights]:
    """Value and gradient of a formula, one example at a time."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tables = []
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        mask = torch.from_numpy(example.loss_mask[1:])
        tables.append(network(ids[None]).logits[0, :-1][mask].log_softmax(-1))
    loss = formula(tables, list(examples))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in network.named_parameters()}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model_path: Path) -> dict[str, tuple[float, Weights]]:
    return {
        name: plain(model_path, formula, examples_with_streams()) for name, (_, formula) in LOSSES.items()
    }


@pytest.mark.parametrize("tokens_per_microbatch", [2 * LONGEST, 1000], ids=["pair by pair", "packed"])
@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_value_and_gradient_are_those_of_the_formula(
    model_path: Path,
    expected: dict[str, tuple[float, Weights]],
    num_ranks: int,
    zero_stage: int,
    tokens_per_microbatch: int,
) -> None:
    changes = {
        "num_ranks": num_ranks,
        "zero_stage": zero_stage,
        "tokens_per_microbatch": tokens_per_microbatch,
    }
    config = CONFIG.model_copy(update={"batch_size": 100, "gradient_clipping": 0.0, **changes})
    losses = {name: loss for name, (loss, _) in LOSSES.items()}
    found = run_ranks(config, model_path, values_and_gradients, examples_with_streams(), losses)
    for name, (value, gradients) in expected.items():
        assert found[name][0] == pytest.approx(value, abs=1e-6, rel=1e-6), name
        for weight, gradient in gradients.items():
            np.testing.assert_allclose(
                found[name][1][weight], gradient, atol=1e-5, err_msg=f"{name}: {weight}"
            )


def of_two_roles() -> list[Example]:
    """The second half of the pairs has another role."""
    examples = examples_with_streams()
    return [replace(e, role="first" if k < 6 else "second") for k, e in enumerate(examples)]


def jointly(first: Any, second: Any) -> Any:
    """0.7 times one formula over the first role, 0.5 times another over the second."""

    def loss(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
        total: torch.Tensor = 0.7 * first(tables[:6], examples[:6]) + 0.5 * second(tables[6:], examples[6:])
        return total

    return loss


def both(first: Loss, second: Loss, *, project: bool = False) -> Joint:
    return Joint((Part("first", first, 0.7), Part("second", second, 0.5)), project_conflicts=project)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_joint_loss_is_the_sum_of_its_parts(model_path: Path, num_ranks: int, zero_stage: int) -> None:
    cases: dict[str, tuple[Joint, Any]] = {
        "nll and kl": (both(WeightedNll(), Divergence("symmetric")), jointly(nll, divergence("symmetric"))),
        "dpo and nll": (both(Dpo(BETA), WeightedNll()), jointly(pairs(dpo_margin), nll)),
    }
    changes = {"num_ranks": num_ranks, "zero_stage": zero_stage, "tokens_per_microbatch": 2 * LONGEST}
    config = CONFIG.model_copy(update={"batch_size": 100, "gradient_clipping": 0.0, **changes})
    losses = {name: loss for name, (loss, _) in cases.items()}
    found = run_ranks(config, model_path, values_and_gradients, of_two_roles(), losses)
    for name, (_, formula) in cases.items():
        value, gradients = plain(model_path, formula, of_two_roles())
        assert found[name][0] == pytest.approx(value, abs=1e-6, rel=1e-6), name
        for weight, gradient in gradients.items():
            np.testing.assert_allclose(found[name][1][weight], gradient, atol=1e-5, err_msg=weight)


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_what_of_one_part_goes_against_the_other_is_taken_out(
    model_path: Path, num_ranks: int, zero_stage: int
) -> None:
    # To make the same tokens likelier and less likely: a clipped ratio at 1 with opposite advantages.
    examples = [
        replace(e, role=role, id=f"{e.id} {role}", unit=f"{e.unit} {role}", streams=streams)
        for role, sign in (("first", 1.0), ("second", -1.0))
        for e in examples_with_streams()[: 6 if sign > 0 else 9]
        for streams in [{"log_weight": np.zeros(1), "advantage": np.full(1, sign), "old_logprob": np.full(1, -5.0)}]
    ]  # fmt: skip
    unlikelier = ClippedRatio(CLIP, CLIP_HIGH)
    joint = Joint((Part("first", WeightedNll()), Part("second", unlikelier)), project_conflicts=True)
    changes = {"num_ranks": num_ranks, "zero_stage": zero_stage, "tokens_per_microbatch": 2 * LONGEST}
    config = CONFIG.model_copy(update={"batch_size": 100, "gradient_clipping": 0.0, **changes})
    found = run_ranks(
        config,
        model_path,
        values_and_gradients,
        examples,
        {"projected": joint, "summed": replace(joint, project_conflicts=False)},
    )
    apart = [
        plain(model_path, formula, [e for e in examples if e.role == role])[1]
        for role, formula in (
            ("first", nll),
            ("second", unclipped),
        )
    ]
    dot = sum(float((one * apart[1][name]).sum()) for name, one in apart[0].items())
    squares = [sum(float((one * one).sum()) for one in part.values()) for part in apart]
    assert dot < -0.1 * squares[0], "they do not go against each other, and this test says nothing"
    for name, one in apart[0].items():
        other = apart[1][name]
        expected = one - dot / squares[1] * other + other - dot / squares[0] * one
        np.testing.assert_allclose(found["projected"][1][name], expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found["summed"][1][name], one + other, atol=1e-5, err_msg=name)


def unclipped(tables: list[torch.Tensor], examples: list[Example]) -> torch.Tensor:
    """What is left of the clipped ratio where advantages are below 0 and ratios far above 1."""
    terms = [torch.exp(picked(t, e) + 5.0) for t, e in zip(tables, examples, strict=True)]
    return torch.cat(terms).mean()


def test_conflicts_are_not_projected_where_no_rank_has_all_weights(model_path: Path) -> None:
    config = CONFIG.model_copy(update={"zero_stage": 3})
    joint = both(WeightedNll(), WeightedNll(), project=True)
    with pytest.raises(UserError, match=r"ZeRO stage 3 cuts up; set learner\.zero_stage to 2 or less"):
        run_ranks(config, model_path, values_and_gradients, of_two_roles(), {"joint": joint})


def test_an_example_of_an_unknown_role_is_an_error_before_any_training(model_path: Path) -> None:
    joint = Joint((Part("first", WeightedNll()),))
    with pytest.raises(UserError, match="no part for the role second of example q6/0"):
        run_ranks(CONFIG, model_path, values_and_gradients, of_two_roles(), {"joint": joint})


@pytest.mark.parametrize("stage", [0, 3])
def test_a_live_reference_is_as_good_as_what_was_recorded_and_takes_no_part_in_the_optimiser(
    model_path: Path, tmp_path: Path, stage: int
) -> None:
    other = build_model(tmp_path / "other", seed=1)
    network = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    recorded = []
    for example in examples_with_streams():
        ids, mask = torch.from_numpy(example.token_ids.astype(np.int64)), example.loss_mask[1:]
        with torch.no_grad():
            logits = network(ids[None]).logits[0, :-1][torch.from_numpy(mask)]
        logprobs = np.zeros(example.length)
        logprobs[1:][mask] = picked(logits.log_softmax(-1), example).numpy()
        streams = {"reference_logits": logits.double().numpy(), "reference_logprob": logprobs}
        recorded.append(replace(example, streams=dict(example.streams) | streams))
    config = CONFIG.model_copy(update={"batch_size": 100, "zero_stage": stage})
    kl = ClippedRatio(kl_coefficient=10.0)
    losses: dict[str, Loss] = {
        "recorded logits": Divergence("forward"),
        "live logits": Divergence("forward", reference=str(other)),
        "recorded log-probabilities": kl,
        "live log-probabilities": replace(kl, reference=str(other)),
    }
    found, trained = run_ranks(config, model_path, with_optimised_parameters, recorded, losses)
    for of in ("logits", "log-probabilities"):
        live, expected = found[f"live {of}"], found[f"recorded {of}"]
        assert live[0] == pytest.approx(expected[0], abs=1e-5)
        for weight, gradient in expected[1].items():
            np.testing.assert_allclose(live[1][weight], gradient, atol=1e-4, err_msg=weight)
    own = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    assert trained == sum(p.numel() for p in own.parameters())


def with_optimised_parameters(learner: Learner, *arguments: Any) -> Any:
    """Also how many numbers the optimiser and the model it belongs to have, the reference not among them."""
    found = values_and_gradients(learner, *arguments)
    return found, sum(getattr(p, "ds_numel", p.numel()) for p in learner.engine.module.parameters())


def test_a_reference_of_another_vocabulary_is_refused(model_path: Path) -> None:
    examples = [
        replace(e, streams={"reference_logits": np.zeros((e.num_targets, VOCABULARY + 1))})
        for e in make_examples()
    ]
    with pytest.raises(UserError, match="logits of 65 tokens, the policy of 64"):
        run_ranks(CONFIG, model_path, values_and_gradients, examples, {"kl": Divergence()})


@pytest.mark.parametrize("shares", [False, True])
def test_merged_copies_give_the_loss_and_the_gradient_of_the_copies(model_path: Path, shares: bool) -> None:
    random = np.random.default_rng(5)
    apart: list[Example] = []
    for k, example in enumerate(make_examples(8)):
        for copy in range(1 + k % 3):
            streams = {
                # Of one example all weights are 0, of another some.
                "log_weight": np.array([-np.inf if k == 4 or copy == 1 else np.log(0.2 + random.random())]),
                "credit": random.random(example.length),
            }
            apart.append(replace(example, id=f"q{k}/{copy}", unit=f"q{k // 2}", streams=streams))
    units = dict.fromkeys(example.unit for example in apart)
    merged = [one for unit in units for one in merge_copies([e for e in apart if e.unit == unit])]
    assert len(merged) == 8 < len(apart)
    config = CONFIG.model_copy(
        update={
            "batch_size": 100,
            "gradient_clipping": 0.0,
            "share_prefixes": shares,
            "tokens_per_microbatch": 1000,
        }
    )
    losses: dict[str, Loss] = {"nll": WeightedNll(), "by token": WeightedNll(by_token=True)}
    whole, less = (
        run_ranks(config, model_path, values_and_gradients, examples, losses) for examples in (apart, merged)
    )
    for name in losses:
        assert less[name][0] == pytest.approx(whole[name][0], rel=1e-6), name
        for weight, gradient in whole[name][1].items():
            np.testing.assert_allclose(
                less[name][1][weight], gradient, atol=1e-6, err_msg=f"{name}: {weight}"
            )


def test_a_missing_stream_is_an_error_before_any_training(model_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Dpo needs the stream label, which example q0/0 has not; it has log_weight"
    ):
        run_ranks(CONFIG, model_path, values_and_gradients, make_examples(), {"dpo": Dpo()})
