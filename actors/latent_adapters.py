"""The latent tasks of a learner's model (`pipeline.core.latent_tasks`): adapters whose channels have gates."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import LatentTasks

ADAPTER = "latent"
"""The name of their adapter beside that of `learner.lora`, "default"."""
TARGET = "o_proj"
"""The output projection of an attention layer, as Llama, Qwen, Mistral and Gemma call it."""


class LatentAdapters:
    """Puts the increments into a model, and sets the gates of the row that it is about to compute.

    What was trained of the model before is trained still, and the increments are.

    Attributes:
        tasks: P.

    Raises:
        UserError: the model has no output projection of that name.
    """

    def __init__(self, model: Any, latent: LatentTasks) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.tasks, self._rank = latent.tasks, latent.rank
        self._gates: Tensor | None = None
        if not any(name.rpartition(".")[2] == TARGET for name, _ in model.named_modules()):
            raise UserError(
                f"latent tasks are increments of the attention's output projection {TARGET}, and a "
                f"{type(model).__name__} has none of that name; use another model, or no latent tasks"
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # peft multiplies by alpha / r, here 1 / P.
        config = LoraConfig(r=latent.tasks * latent.rank, lora_alpha=latent.rank, target_modules=[TARGET])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of learner.lora
            inject_adapter_in_model(config, model, ADAPTER)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(list(module.lora_A))  # peft computes with the newest adapter alone
                if ADAPTER in module.lora_A:
                    module.lora_A[ADAPTER].register_forward_hook(self._through_gates)
        for parameter in trained:
            parameter.requires_grad_(True)

    def open(self, gates: Tensor) -> None:
        """Compute with these gates [T, P] from now on, also where a backward pass computes layers again."""
        self._gates = gates.repeat_interleave(self._rank, dim=1)

    def _through_gates(self, module: Any, inputs: Any, channels: Tensor) -> Tensor:
        """[1, T, P r]. Without gates all are at their mean, as the exported weights have it."""
        return channels if self._gates is None else channels * self._gates.to(channels.dtype)
