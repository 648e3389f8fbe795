"""Cross-encoders: how well a passage answers a query, both read together.

Guarantees:
- a score is the model's raw output, finite, higher is better: no squashing function makes good passages equal;
- the same pairs in the same order give the same scores; in other company their last bits may differ;
- re-rankers with equal `fingerprint` give equal scores, up to the arithmetic of their devices.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retriever_service.encoding.transformer import fingerprint, token_limit
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage, passage_text

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

_CPU_BATCH, _GPU_BATCH = 16, 128


class Reranker:
    """A sentence-transformers cross-encoder. Use one instance from one thread at a time."""

    def __init__(self, model: CrossEncoder) -> None:
        self._model = model
        self.fingerprint = fingerprint(
            model,
            {
                "modules": [type(module).__name__ for module in model],
                "max_length": model.max_seq_length,
                "prompt": model.prompts.get(model.default_prompt_name),
            },
        )

    @classmethod
    def open(cls, model: str, device: str = "cpu") -> Reranker:
        """Load a cross-encoder onto `device` (a torch device name).

        Args:
            model: a directory or hub name that sentence-transformers' CrossEncoder can open.

        Raises:
            RetrieverError: it cannot be found or opened, is no re-ranker, or there is no such device.
        """
        import torch
        from sentence_transformers import CrossEncoder
        from transformers.utils import logging as transformers_logging

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RetrieverError(f"the re-ranker cannot run on {device!r}: torch finds no GPU; use 'cpu'")
        if Path(model).is_dir():
            transformers_logging.disable_progress_bar()  # a bar is for downloads
        # Half precision is slow on CPUs, whatever the weights were stored in.
        model_kwargs = {"dtype": "float32" if device == "cpu" else "auto"}
        try:
            loaded = CrossEncoder(
                model, device=device, activation_fn=torch.nn.Identity(), model_kwargs=model_kwargs
            )
        except (OSError, ValueError) as error:
            raise RetrieverError(
                f"re-ranker {model!r} cannot be loaded: {error}. Give a model directory or a model name of the "
                "Hugging Face hub, such as cross-encoder/ms-marco-MiniLM-L6-v2"
            ) from error
        _check_is_reranker(loaded, model)
        limit = token_limit(loaded)
        loaded.max_seq_length = min(loaded.max_seq_length or limit, limit)
        logger.info(f"re-ranker {model}: up to {loaded.max_seq_length} tokens")
        return cls(loaded)

    def scores(self, pairs: Sequence[tuple[str, Passage]]) -> npt.NDArray[np.float32]:
        """One score for every (query, passage)."""
        scores: npt.NDArray[np.float32] = np.asarray(
            self._model.predict(
                [(query, passage_text(passage)) for query, passage in pairs],
                batch_size=_CPU_BATCH if self._model.device.type == "cpu" else _GPU_BATCH,
                show_progress_bar=False,
            ),
            dtype=np.float32,
        )
        if not np.isfinite(scores).all():
            raise RuntimeError("the re-ranker gave infinite or undefined scores")
        return scores


def _check_is_reranker(model: CrossEncoder, name: str) -> None:
    mend = "give a cross-encoder that was trained to re-rank"
    if model.num_labels != 1:
        raise RetrieverError(
            f"{name} gives {model.num_labels} scores for a pair, a re-ranker gives one; {mend}"
        )
    architectures = model.config.architectures or [""]
    # transformers fills a missing head with random numbers, and only warns.
    if len(model) == 1 and not architectures[0].endswith("ForSequenceClassification"):
        raise RetrieverError(f"{name} is a {architectures[0]}, which has no trained score; {mend}")
