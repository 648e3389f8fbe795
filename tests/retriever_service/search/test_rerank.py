"""Re-ranking: what the cross-encoder is given, what it may not depend on, what is no re-ranker. A tiny random BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.search.rerank import Reranker

pytestmark = pytest.mark.component

WORDS = ["lion", "tiger", "otter", "eagle", "sleeps", "swims", "where"]
PAIRS = [
    ("where lion", Passage("1", "lion", "lion sleeps")),
    ("otter", Passage("2", "", "otter swims " * 30)),
    ("where lion", Passage("3", "eagle", "tiger " * 9)),
    ("tiger", Passage("4", "", "tiger")),
]


def write_model(
    directory: Path, *, labels: int = 1, seed: int = 0, kind: Any = BertForSequenceClassification
) -> str:
    """A BERT of two small layers with random weights, and a tokenizer of whole words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.5,
    )
    kind(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reranker(model: str) -> Reranker:
    return Reranker.open(model)


def test_score_is_the_raw_output_for_query_and_titled_passage(model: str, reranker: Reranker) -> None:
    bert = BertForSequenceClassification.from_pretrained(model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    with torch.inference_mode():
        expected = bert(**tokenizer("where lion", "lion lion sleeps", return_tensors="pt")).logits.item()
    scores = reranker.scores(PAIRS)
    assert scores.dtype == np.float32
    assert scores[0] == pytest.approx(expected, rel=1e-4)


def test_every_pair_gets_its_own_score_in_whatever_order_and_company(reranker: Reranker) -> None:
    alone = np.concatenate([reranker.scores([pair]) for pair in PAIRS])
    assert reranker.scores(PAIRS * 9) == pytest.approx(np.tile(alone, 9), rel=1e-4)
    assert reranker.scores(PAIRS[::-1])[::-1] == pytest.approx(alone, rel=1e-4)
    assert reranker.scores(PAIRS).tolist() == reranker.scores(PAIRS).tolist()


def test_pairs_of_different_words_have_clearly_different_scores(reranker: Reranker) -> None:
    assert np.diff(np.sort(reranker.scores(PAIRS))).min() > 0.01


def test_passage_longer_than_the_model_takes_is_cut(reranker: Reranker) -> None:
    long, longer = (Passage("1", "", "otter " * times) for times in (100, 500))
    first, second = reranker.scores([("lion", long), ("lion", longer)])
    assert first == second


def test_no_pairs_have_no_scores(reranker: Reranker) -> None:
    assert reranker.scores([]).shape == (0,)


def test_fingerprint_tells_weights_apart_and_not_places(tmp_path: Path, reranker: Reranker) -> None:
    copy = Reranker.open(write_model(tmp_path / "copy"))
    other = Reranker.open(write_model(tmp_path / "other", seed=1))
    assert copy.fingerprint == reranker.fingerprint
    assert copy.scores(PAIRS).tolist() == reranker.scores(PAIRS).tolist()
    assert other.fingerprint != reranker.fingerprint


def test_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="gives 3 scores for a pair"):
        Reranker.open(write_model(tmp_path, labels=3))


def test_model_without_a_trained_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="is a BertModel, which has no trained score"):
        Reranker.open(write_model(tmp_path, kind=BertModel))


def test_directory_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="cannot be loaded"):
        Reranker.open(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_that_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(RetrieverError, match="finds no GPU"):
        Reranker.open(model, device="cuda")
