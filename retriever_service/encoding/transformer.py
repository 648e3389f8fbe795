"""What encoders and re-rankers have in common: both are models of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

PAD_TO_MULTIPLE = 8
"""Tokens."""
_TOKENIZER_PROBE = "Probe \u00c9t\u00e9 42nd-street (naive)"


def token_limit(model: SentenceTransformer | CrossEncoder) -> int:
    """The longest input that the position embeddings allow (tokens), padding included."""
    transformer: Any = model[0]
    config = transformer.auto_model.config
    positions = getattr(config, "max_position_embeddings", None) or model.max_seq_length or 512
    # RoBERTa-like models number their positions from padding_idx + 1.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    limit = int(positions) - offset
    return limit - limit % PAD_TO_MULTIPLE


def fingerprint(model: SentenceTransformer | CrossEncoder, use: Mapping[str, Any]) -> str:
    """SHA-256 over weights, vocabulary and the use that is made of them.

    The model's name is left out: a copy in another directory is the same model.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    description = {
        **use,
        "vocabulary": sorted(model.tokenizer.get_vocab().items()),
        "probe": model.tokenizer(_TOKENIZER_PROBE)["input_ids"],
    }
    digest.update(json.dumps(description, sort_keys=True).encode())
    return digest.hexdigest()
