"""The receiving half of a push, inside each vLLM worker process.

One class per transport, each a vLLM `WeightTransferEngine` that loads through vLLM's layerwise reload (the only route
by which weights may change after start-up: it repacks them for the kernels layer by layer) and digests every tensor
before it is loaded. `WeightReceipts` is the worker extension through which the engine asks what arrived.

Imported in vLLM workers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from actors.engine_memory import drop_contents
from actors.weight_bucket import Digest, Manifest
from actors.weight_transfer import WeightTransferError, register


def tied_heads(model: torch.nn.Module) -> list[ParallelLMHead]:
    """Output layers that share the embedding's weight. Not while an update is open."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = [layer for layer in layers if not isinstance(layer, ParallelLMHead)]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)]
    return [head for head in heads if any(head.weight is embedding.weight for embedding in embeddings)]


def refresh_tied_heads(heads: Iterable[ParallelLMHead]) -> None:
    """Packs the shared weight for the head's kernel again.

    vLLM's reload does that for the embedding only. On CPUs the head multiplies with a packed copy, so without this it
    would go on with the weights of the start (vllm.model_executor.model_loader.reload, limitation 2).
    """
    for head in heads:
        head.quant_method.process_weights_after_loading(head)


class _Verified(WeightTransferEngine[Any, Any]):
    """Keeps the digest of what one update received, and survives an update that was broken off."""

    model: Any

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.received = Digest()
        self._tied_heads = tied_heads(model)
        self._open = False

    def start_weight_update(self) -> None:
        if self._open:
            # The last update was broken off: put the layers back together first, or their half-filled load buffers
            # would be taken for a part of this update.
            self.finish_weight_update()
        initialize_layerwise_reload(self.model)
        self.received = Digest()
        self._open = True

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_heads(self._tied_heads)
        self._open = False

    def incomplete_layers(self) -> list[str]:
        """Layers that still wait for weights in the open update."""
        names = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            # Attention layers hold scales that most checkpoints lack; a tied head takes what the embedding gets.
            if not info.can_load() or is_deferred_attention_layer(layer) or layer in self._tied_heads:
                continue
            wanted = sum(get_tensor_load_numel(p) for p in layer._parameters.values() if p is not None)
            if isinstance(layer, VocabParallelEmbedding):
                wanted = min(wanted, 1)  # Vocabularies are padded, and nobody sends the padding.
            if info.load_numel < wanted:
                names.append(name)
        return names


class _Digesting:
    """Stands in for the model while vLLM's engines receive: digests, then loads."""

    def __init__(self, model: Any, received: Digest) -> None:
        self._model = model
        self._received = received

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        weights = list(weights)
        for name, tensor in weights:
            self._received.add(name, tensor)
        return self._model.load_weights(weights)


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: the fields of `actors.weight_bucket.Manifest` and the segment's path."""

    path: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    digest: str


class SharedMemoryReceiver(_Verified):
    """Maps the sender's segment and loads straight from it; the digest is checked before anything is loaded."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        manifest = Manifest(
            update_info.names,
            update_info.dtype_names,
            update_info.shapes,
            update_info.offsets,
            update_info.nbytes,
            update_info.digest,
        )
        data = torch.from_file(update_info.path, shared=False, size=manifest.nbytes, dtype=torch.uint8)
        weights = manifest.tensors(data)
        bucket = Digest()
        for name, tensor in weights:
            bucket.add(name, tensor)
        if bucket.hexdigest() != manifest.digest:
            raise WeightTransferError(
                f"a bucket of {len(weights)} tensors ({weights[0][0]} ...) arrived damaged: digest "
                f"{bucket.hexdigest()[:12]}, sent {manifest.digest[:12]}"
            )
        self.received.update(bucket)
        self.model.load_weights(weights)
        self._let_go_of(data)

    def _let_go_of(self, data: torch.Tensor) -> None:
        """Copies what incomplete layers keep until the next bucket: the sender is about to overwrite `data`."""
        for layer in self.model.modules():
            for _, arguments in get_layerwise_info(layer).loaded_weights:
                for key, value in arguments.arguments.items():
                    if isinstance(value, torch.Tensor) and _same_storage(value, data):
                        arguments.arguments[key] = value.clone()

    def shutdown(self) -> None:
        pass


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class NcclReceiver(_Verified, NCCLWeightTransferEngine):
    """vLLM's NCCL engine, digesting what it receives. Every push brings its own NCCL group."""

    def init_transfer_engine(self, init_info: Any) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, _Digesting(self.model, self.received)
        try:
            NCCLWeightTransferEngine.receive_weights(self, update_info)
        finally:
            self.model = model


class IpcReceiver(_Verified, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine, digesting what it receives."""

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, _Digesting(self.model, self.received)
        try:
            IPCWeightTransferEngine.receive_weights(self, update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()


class WeightReceipts:
    """vLLM worker extension: what each worker received. Its methods are reached through `collective_rpc`."""

    model_runner: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def weight_receipt(self) -> dict[str, Any]:
        """Digest and number of the tensors of the open update, and the layers that still wait for weights."""
        engine = self.weight_transfer_engine
        return {
            "digest": engine.received.hexdigest(),
            "tensors": len(engine.received),
            "incomplete": engine.incomplete_layers(),
        }

    def refresh_tied_heads(self) -> None:
        """To be called after vLLM's own `reload_weights`."""
        refresh_tied_heads(tied_heads(self.model_runner.get_model()))

    def release_memory(self) -> None:
        """On CPUs: give back the memory of weights and of cached keys and values. The next update fills it again."""
        model = self.model_runner.get_model()
        for layer in model.modules():
            if hasattr(layer, "cpu_linear"):
                # It holds a copy of the weight, packed for its kernel; the update makes another one.
                layer.cpu_linear = torch.nn.functional.linear
        drop_contents([*self.model_runner.kv_caches, *model.parameters()])

    def discard_weight_update(self) -> None:
        """Lets a new update start although the last one never finished."""
        self._weight_update_active = False


# vLLM imports this module in every worker, as the worker extension's home, before it looks the engine up: the engines
# are known even where the entry point is not installed (a source checkout) or not loaded (VLLM_PLUGINS).
register()
