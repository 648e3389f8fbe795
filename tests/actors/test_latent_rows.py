"""Latent tasks in one process, without DeepSpeed: a packed row in which every example has weights of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from actors.latent_adapters import LatentAdapters
from actors.learner_outputs import ModelOutputs
from actors.learner_weights import named_weights
from pipeline.core.attention import PACKED
from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import LatentTasks, gates_of, streams_of
from pipeline.core.packing import collate
from pipeline.core.records import Example

GATES = ([2.0, 0.5, 0.0], [0.0, 1.5, 1.5], [0.25, 0.0, 3.0], [2.0, 0.5, 0.0])
IDS = ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 10, 11], [5, 6, 7, 12])
"""All begin alike; the first and the last have the same gates as well."""
PROJECTIONS = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]


@pytest.fixture
def model() -> Any:
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


def with_increments(model: Any) -> LatentAdapters:
    """Three tasks of rank 2, whose B is not 0."""
    latent = LatentAdapters(model, LatentTasks(3, 2))
    with torch.no_grad():
        for name in PROJECTIONS:
            model.get_submodule(name).lora_B["latent"].weight.normal_()
    return latent


def examples() -> list[Example]:
    return [
        Example(
            f"q{k}",
            f"q{k}",
            "searcher",
            np.array(ids, np.int32),
            np.ones(len(ids), bool),
            streams_of(np.array(own)),
        )
        for k, (ids, own) in enumerate(zip(IDS, GATES, strict=True))
    ]


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_example_of_a_row_has_weights_of_its_own(
    model: Any, share_prefixes: bool, checkpointing: bool
) -> None:
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    outputs = ModelOutputs(model, model, torch.device("cpu"), with_increments(model))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    row = collate((0, 1, 2, 3), examples(), share_prefixes=share_prefixes, latent_tasks=3)
    assert row.input_ids.shape[1] == (13 if share_prefixes else 16)
    found = outputs.of(row, "logprobs")
    found.sum().backward()

    ab = {
        name: [getattr(model.get_submodule(name), kind)["latent"].weight for kind in ("lora_A", "lora_B")]
        for name in PROJECTIONS
    }
    ours = {name: [weight.detach().clone().requires_grad_() for weight in both] for name, both in ab.items()}
    reference = type(model)(model.config)
    expected = []
    for example in examples():
        gates = torch.from_numpy(gates_of(example.streams, 3)).repeat_interleave(2)
        changed = {f"{n}.weight": plain[f"{n}.weight"] + (b * gates) @ a / 3 for n, (a, b) in ours.items()}
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        further = {"segment_lengths": (ids.shape[1],), "use_cache": False}
        logits = torch.func.functional_call(reference, {**plain, **changed}, (ids,), further).logits
        expected.append(logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    torch.cat(expected).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    for name in PROJECTIONS:
        for weight, formula in zip(ab[name], ours[name], strict=True):
            assert bool(formula.grad.abs().max() > 1e-3)  # type: ignore[union-attr]
            torch.testing.assert_close(weight.grad, formula.grad, atol=1e-5, rtol=1e-4)
    embedding = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(embedding, plain["model.embed_tokens.weight"].grad, atol=1e-5, rtol=1e-4)


def test_what_is_sent_to_engines_is_the_mean_of_the_gates(model: Any) -> None:
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    latent = with_increments(model)
    sent = {n: w for some in named_weights(model, 1 << 20, torch.float32, partitioned=False) for n, w in some}
    assert sent.keys() == plain.keys()
    for name in plain:
        expected = plain[name]
        if name.removesuffix(".weight") in PROJECTIONS:
            module = model.get_submodule(name.removesuffix(".weight"))
            expected = expected + module.lora_B["latent"].weight @ module.lora_A["latent"].weight / 3
        torch.testing.assert_close(sent[name], expected)
    assert latent.tasks == 3


def test_increments_are_nothing_at_first_and_trained_beside_all_weights(model: Any) -> None:
    """Those of the released program are in no model, and stay nothing."""
    before = {name for name, _ in model.named_parameters()}
    LatentAdapters(model, LatentTasks(3, 2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.replace(".base_layer.", ".") for name in trained if ".lora_" not in name} == before
    increments = [name for name in trained if ".lora_" in name]
    assert sorted(increments) == sorted(f"{n}.lora_{x}.latent.weight" for n in PROJECTIONS for x in "AB")
    assert all(not trained[name].any() for name in increments if ".lora_B." in name)


def test_a_model_without_that_projection_is_refused() -> None:
    with pytest.raises(UserError, match="output projection o_proj, and a Linear has none"):
        LatentAdapters(torch.nn.Linear(2, 2), LatentTasks(3, 2))
