"""Heads other than a language model's: a critic that learns values, an encoder that learns to find passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from pipeline.core.errors import UserError
from pipeline.core.losses.contrastive import InfoNce
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.policy_gradient import ClippedValue
from pipeline.core.records import Example
from retriever_service.encoding.encoder import Encoder, EncoderSpec
from retriever_service.passages.corpus import Passage
from tests.actors.encoders import ENCODER_CONFIG, PEOPLE, TOWNS, build_encoder, homes
from tests.actors.ranks import CONFIG, VOCABULARY, build_model, make_examples, run_ranks, train_and_export

pytestmark = pytest.mark.component


# ---------------------------------------------------------------- values


def counting_examples(count: int = 24) -> list[Example]:
    """The value of a token is how often token 7 came before it, in fifths: a small model can count."""
    random = np.random.default_rng(0)
    examples = []
    for k in range(count):
        ids = np.where(random.random(16) < 0.3, 7, random.integers(8, VOCABULARY, 16)).astype(np.int32)
        returns = np.concatenate([[0.0], np.cumsum(ids == 7)[:-1]]) / 5
        examples.append(Example(f"q{k}", f"q{k}", "critic", ids, np.ones(16, np.bool_), {"return": returns}))
    return examples


@pytest.mark.parametrize("changes", [{}, {"num_ranks": 2, "zero_stage": 3}], ids=["stage 0", "stage 3"])
def test_a_value_head_learns_a_known_function_and_opens_in_transformers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, out = build_model(tmp_path / "model"), tmp_path / "critic"
    config = CONFIG.model_copy(update={"epochs": 60, "batch_size": 12, "learning_rate": 5e-3, **changes})
    history = run_ranks(
        config, model, train_and_export, counting_examples(), ClippedValue(), out, head="value"
    )
    assert history[0]["squared_error"] > 0.1
    assert history[-1]["squared_error"] < 0.01
    opened = transformers.AutoModelForTokenClassification.from_pretrained(out)
    assert opened.config.num_labels == 1


def test_a_value_head_cannot_be_trained_on_likelihoods(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    with pytest.raises(UserError, match="WeightedNll needs logprobs, which a head value does not give"):
        run_ranks(CONFIG, model, train_and_export, make_examples(), WeightedNll(), tmp_path, head="value")


# ---------------------------------------------------------------- embeddings


def recall_at_1(model: Path) -> float:
    """Share of the people whose nearest passage is their town, for what opens the directory as an encoder."""
    encoder = Encoder.load(EncoderSpec(str(model), dtype="float32"))
    towns = [Passage(str(k), "", town) for k, town in enumerate(TOWNS)]
    scores = encoder.encode_queries(list(PEOPLE)) @ np.concatenate(list(encoder.encode_passages(towns))).T
    return float(np.mean(scores.argmax(-1) == np.arange(len(TOWNS))))


@pytest.mark.parametrize(
    "changes", [{}, {"num_ranks": 2, "zero_stage": 3}], ids=["1 rank", "2 ranks, stage 3"]
)
def test_an_embedding_head_learns_to_find_and_opens_as_an_encoder(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, out = build_encoder(tmp_path / "encoder"), tmp_path / "trained"
    examples = homes(transformers.AutoTokenizer.from_pretrained(model))
    config = ENCODER_CONFIG.model_copy(update=changes)
    history = run_ranks(config, model, train_and_export, examples, InfoNce(), out, head="embedding")
    assert history[-1]["recall_at_1"] == 1.0
    assert recall_at_1(model) < 0.5
    assert recall_at_1(out) == 1.0
