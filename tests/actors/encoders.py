"""A tiny random sentence encoder for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.config import LearnerConfig
from pipeline.core.records import Example

PEOPLE = ("ada", "bruno", "clara", "dmitri", "elena", "farid", "greta", "hugo")
TOWNS = ("arlen", "bexton", "corwick", "dunmere", "eastleigh", "farrow", "glenby", "harwich")
"""Where each of them lives: nothing that an untrained encoder could know."""


def build_encoder(path: Path, seed: int = 0) -> Path:
    """A random BERT of two layers with mean pooling, whose words are `PEOPLE` and `TOWNS`."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PEOPLE, *TOWNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert = path.with_name(f"{path.name}-bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(bert)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(bert)
    transformer = Transformer(str(bert))
    modules = [transformer, Pooling(transformer.get_embedding_dimension())]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(path), create_model_card=False)
    return path


ENCODER_CONFIG = LearnerConfig(
    dtype="float32",
    batch_size=32,
    epochs=30,
    learning_rate=3e-3,
    tokens_per_microbatch=256,
    threads_per_rank=1,
)


def homes(tokenizer: Any) -> list[Example]:
    """People are the queries, their towns the passages."""
    examples = []
    for k, texts in enumerate(zip(PEOPLE, TOWNS, strict=True)):
        for text, role in zip(texts, ("query", "passage"), strict=True):
            ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
            streams = {"is_query": np.array([float(role == "query")]), "group": np.array([float(k)])}
            nothing = np.zeros(len(ids), np.bool_)
            examples.append(Example(f"{role} {k}", "all", role, ids, nothing, streams))
    return examples
