"""From a packed row to what a loss is computed from, and from its shares to the figures of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from actors.collectives import gathered
from actors.latent_adapters import LatentAdapters
from pipeline.core.losses.loss import Loss, Output, Rows, Terms
from pipeline.core.losses.token_logprobs import token_logprobs
from pipeline.core.packing import PackedBatch
from pipeline.core.policies import Head

OF_HEAD: dict[Head, tuple[Output, ...]] = {
    "lm": ("logprobs", "logits"),
    "value": ("values",),
    "embedding": ("embeddings",),
}
"""What each head can be asked for."""


class ModelOutputs:
    """Runs a model on packed rows.

    Args:
        call: what is called: a DeepSpeed engine, or the model itself.
        model: the model.
        latent: its latent tasks, if it has some.
    """

    def __init__(
        self, call: Any, model: Any, device: torch.device, latent: LatentAdapters | None = None
    ) -> None:
        from pipeline.core.attention import PACKED

        self._call, self._device, self._latent = call, device, latent
        config = getattr(model, "config", None)
        self._packed_attention = getattr(config, "_attn_implementation", None) == PACKED

    @property
    def can_share_prefixes(self) -> bool:
        """Whether it takes rows in which what several examples begin with is there once."""
        return self._packed_attention

    def of(self, batch: PackedBatch, output: Output) -> torch.Tensor:
        """`logprobs` or `values` [M], `logits` [M, V], `embeddings` [n, D]; see `Outputs`."""
        if output == "embeddings":
            return self._embeddings(batch)
        if output == "values":
            predicted = self._forward(batch).logits[0, self._tensor(batch.predictors), 0]
            return predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        if output == "logits":
            return self._logits(batch, batch.predictors)
        # What several examples predict alike, the same target from the same tokens, passes the output layer once.
        pairs = batch.predictors * (batch.targets.max() + 1) + batch.targets
        _, first, back = np.unique(pairs, return_index=True, return_inverse=True)
        logits = self._logits(batch, batch.predictors[first])
        logprobs = token_logprobs(logits, self._tensor(batch.targets[first]))
        return logprobs if np.array_equal(back, np.arange(len(first))) else logprobs[self._tensor(back)]

    def _logits(self, batch: PackedBatch, predictors: npt.NDArray[np.int64]) -> torch.Tensor:
        logits: torch.Tensor = self._forward(batch, logits_to_keep=self._tensor(predictors)).logits
        return logits.squeeze(0)  # unlike [0] it has a gradient that is a view

    def _forward(self, batch: PackedBatch, **further: Any) -> Any:
        if self._latent is not None:
            self._latent.open(self._tensor(batch.gates))
        if self._packed_attention:
            further |= {"segment_lengths": batch.segment_lengths, "branches": batch.branches}
        return self._call(
            input_ids=self._tensor(batch.input_ids),
            position_ids=self._tensor(batch.position_ids),
            use_cache=False,  # with a cache transformers does not look for packed examples in position_ids
            **further,
        )

    def _embeddings(self, batch: PackedBatch) -> torch.Tensor:
        """A sentence encoder reads its texts beside each other, padded."""
        texts = self._tensor(batch.input_ids[0]).split(batch.segment_lengths)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        features = {"input_ids": pad_sequence(texts, batch_first=True), "attention_mask": mask}
        embeddings: torch.Tensor = self._call(features)["sentence_embedding"]
        return embeddings

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


class LiveReference:
    """The frozen model whose outputs a loss needs beside the policy's. It is loaded when it is first asked for, one at
    a time, and never trained: no optimiser knows it.

    Args:
        load: gives the model of a directory.
    """

    def __init__(self, load: Callable[[str], Any], device: torch.device) -> None:
        self._load, self._device = load, device
        self._source: str | None = None
        self._outputs: ModelOutputs | None = None

    def of(self, loss: Loss, batch: PackedBatch) -> torch.Tensor | None:
        """What it computes of a packed row; None if the loss needs no reference."""
        if loss.reference is None:
            return None
        if self._outputs is None or self._source != loss.reference:
            self.drop()
            model = self._load(loss.reference)
            self._source, self._outputs = loss.reference, ModelOutputs(model, model, self._device)
        with torch.no_grad():
            return self._outputs.of(batch, loss.output)

    def drop(self) -> None:
        """Give its memory back; it is loaded again when it is asked for."""
        self._source = self._outputs = None


class Sums:
    """Loss and metrics of one optimiser step, added over packed rows and ranks in float64."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._metrics: dict[str, torch.Tensor] = {}

    def add(self, terms: Terms) -> None:
        self._loss += terms.loss.detach()
        for name, (total, count) in terms.metrics.items():
            both = torch.stack([torch.as_tensor(x, device=self._device).double() for x in (total, count)])
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(both)) + both

    def over_all_ranks(self) -> tuple[float, dict[str, float]]:
        """The loss, and the mean of each metric. A rank whose rows were all empty has no metrics of its own."""
        names = sorted(set().union(*gathered(list(self._metrics))))
        nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
        flat = (
            torch.stack([self._metrics.get(name, nothing) for name in names]).flatten()
            if names
            else nothing[:0]
        )
        sums = torch.cat([self._loss[None], flat])
        dist.all_reduce(sums)
        loss, *rest = sums.tolist()
        return loss, {name: rest[2 * i] / max(1.0, rest[2 * i + 1]) for i, name in enumerate(names)}


def rows_of(batch: PackedBatch, device: torch.device) -> Rows:
    """A packed row as a loss sees it."""

    def on_device(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    return Rows(
        example_of_target=torch.from_numpy(batch.example_of_target).to(device),
        unit=torch.from_numpy(batch.unit).to(device),
        numbers=on_device(batch.numbers),
        streams=on_device(batch.streams),
    )
