"""The gradients of an optimiser step, one for each part of a joint loss, and their sum without conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.latent_adapters import LatentAdapters
from actors.learner_outputs import ModelOutputs
from pipeline.core.losses.joint import Part, without_conflicts
from pipeline.core.packing import collate


class GradientsApart:
    """Takes gradients past DeepSpeed, which knows their sum alone, and hands it the one that is to be applied.

    Args:
        engine: DeepSpeed's, at ZeRO stage 2 at most: every rank has all weights.
        model: the engine's.
        parts: of the loss.
        latent: the model's latent tasks, if it has some.

    Attributes:
        outputs: what losses are computed from: of the model itself, since DeepSpeed would take part in their gradients.
        conflict: whether two parts' gradients went against each other; known from `joined` on.
    """

    def __init__(
        self,
        engine: Any,
        model: Any,
        parts: Sequence[Part],
        device: torch.device,
        latent: LatentAdapters | None = None,
    ) -> None:
        self.outputs = ModelOutputs(model, model, device, latent)
        self.conflict = False
        self._through_engine = ModelOutputs(engine, model, device, latent)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._sizes = [weight.numel() for weight in self._weights]
        self._gradients = [torch.zeros(sum(self._sizes), device=device) for _ in parts]
        self._output = parts[0].loss.output
        self._empty = collate((), [], latent_tasks=latent.tasks if latent is not None else 0)

    def add(self, part: int, loss: Tensor) -> None:
        """Add the gradient of this rank's share of a part's loss."""
        found = torch.autograd.grad(loss, self._weights, allow_unused=True)
        for total, one in zip(self._gradients[part].split(self._sizes), found, strict=True):
            if one is not None:
                total += one.flatten()

    def joined(self) -> Tensor:
        """A scalar for the engine's `backward`: its gradient is the parts' sum over all ranks, without conflicts.

        Collective.
        """
        for gradient in self._gradients:
            dist.all_reduce(gradient)
        self.conflict = any(
            bool(one @ other < 0)
            for number, one in enumerate(self._gradients)
            for other in self._gradients[:number]
        )
        pieces = without_conflicts(self._gradients).split(self._sizes)
        inner = [
            torch.dot(weight.flatten(), piece.to(weight.dtype)).float()
            for weight, piece in zip(self._weights, pieces, strict=True)
        ]
        # The engine gets ready for gradients when a result of its own is differentiated.
        nothing = self._through_engine.of(self._empty, self._output).sum() * 0.0
        return torch.stack(inner).sum() + nothing
