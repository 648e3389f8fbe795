"""How one learner rank comes up: process group, threads, model, DeepSpeed's configuration, random seeds."""

from __future__ import annotations

import logging
import os
import random
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from actors.collectives import choose_interface, gathered, meet
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import UserError
from pipeline.core.plan.memory import number_format
from pipeline.core.policies import Head
from retriever_service.imports import quick_imports
from retriever_service.linear import use_onednn
from retriever_service.machine import available_cores

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait of a rank for the others in one collective operation."""
STORE_TIMEOUT = timedelta(hours=1)
"""Longest wait for the others to start. Who starts them ends it sooner (`learner.start_timeout_s`)."""


def import_deepspeed() -> Any:
    """DeepSpeed takes seconds to import, and must be told about a machine without GPUs before that."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quick_imports():
        import deepspeed

    # DeepSpeed would compile its own shared-memory collectives at the first start: that needs a C++ compiler,
    # and a process killed meanwhile leaves a lock on which every later one waits for ever. gloo does as well.
    deepspeed.ops.__compatible_ops__ = {}
    # Old names of torch collectives, which DeepSpeed still uses: a line per call and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for `config`.

    Accumulation is bounded by hand (`set_gradient_accumulation_boundary`): the number of packs differs from
    step to step. bfloat16 keeps float32 master weights and sums gradients in float32; stage 0 cannot do
    that and runs as stage 1, which on one rank is the same thing.
    """
    bfloat16 = dtype == torch.bfloat16
    zero: dict[str, Any] = {"stage": max(config.zero_stage, 1) if bfloat16 else config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW everywhere: nothing to compile
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def open_store() -> tuple[Any, tuple[str, int]]:
    """A store where ranks meet, and its address and port. It is open as long as the store lives.

    Whoever starts the ranks opens it: a port that was found free for rank 0 may be taken before rank 0 is up.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return store, (ray.util.get_node_ip_address(), store.port)


def join_process_group(
    store_address: tuple[str, int] | None, *, rank: int, world_size: int, local_rank: int
) -> torch.device:
    """Meet the other ranks (nccl on GPUs, gloo on CPUs); returns this rank's device. None: there are no others."""
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes its device from here
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    host, port = store_address or ("127.0.0.1", 0)
    choose_interface(host)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # not in its __all__
    if store_address is not None:
        store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)  # type: ignore[attr-defined]
        store.set(f"rank/{rank}", "is here")
        store.wait([f"rank/{other}" for other in range(world_size)])
    # No device_id: with it, nccl is known to hang under DeepSpeed.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    meet()
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def fair_share_of_threads() -> int:
    """Cores of this machine divided by the ranks on it (collective)."""
    here = socket.gethostname()
    return max(1, available_cores() // gathered(here).count(here))


def resolve_dtype(config: LearnerConfig, device: torch.device) -> torch.dtype:
    """Number format of weights and activations."""
    name = number_format(config.dtype, "gpu" if device.type == "cuda" else "cpu")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_model(
    config: LearnerConfig, source: Path, dtype: torch.dtype, ds_config: dict[str, Any], head: Head
) -> tuple[Any, Any]:
    """The model with its adapters, and an object that must live as long as it.

    Under ZeRO-3 the parameters are partitioned while they are read: no rank ever holds the whole model.
    """
    from transformers.integrations import HfDeepSpeedConfig

    zero_init = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    if head == "embedding":
        return _sentence_encoder(config, source, dtype), zero_init
    model = _transformer(config, source, dtype, head)
    if head == "lm" and not torch.cuda.is_available():
        _embed_sparsely(model)
    if config.lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = config.lora.target_modules
        adapters = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft divides it; annotated int
            lora_dropout=config.lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        model = inject_adapter_in_model(adapters, model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, zero_init


def load_frozen(
    config: LearnerConfig, source: str, dtype: torch.dtype, device: torch.device, zero_init: Any
) -> Any:
    """A whole copy of a language model that is not trained, on this rank alone.

    Args:
        zero_init: what `load_model` gave: under ZeRO-3 this one would be partitioned too.
    """
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        model = _transformer(config, Path(source), dtype, "lm")
    finally:
        if zero_init is not None:
            deepspeed.set_hf_deepspeed_config(zero_init)
    return model.to(device).eval().requires_grad_(False)


def _transformer(config: LearnerConfig, source: Path, dtype: torch.dtype, head: Head) -> Any:
    with quick_imports():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    from pipeline.core.attention import PACKED

    attention = PACKED if config.attention == "packed" else config.attention
    if head == "lm":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    else:
        shape = AutoConfig.from_pretrained(source, num_labels=1)
        shape.classifier_dropout = 0.0
        model = AutoModelForTokenClassification.from_pretrained(
            source, config=shape, dtype=dtype, attn_implementation=attention
        )
    if not torch.cuda.is_available():
        use_onednn(model)
    return model


def _embed_sparsely(model: Any) -> None:
    """Where the output layer's weight is the embedding's too, have the embedding give its gradient by rows.

    They are added to the output layer's, which is dense in any case. Else it is a matrix of its own, of zeros but for
    some hundred rows of maybe 262,144, that a CPU has to write and to add.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and head is not None and head.weight is embedding.weight:
        embedding.sparse = True


def _sentence_encoder(config: LearnerConfig, source: Path, dtype: torch.dtype) -> Any:
    from sentence_transformers import SentenceTransformer

    if config.lora is not None or config.gradient_checkpointing:
        raise UserError(
            "learner.lora and learner.gradient_checkpointing are for language models; a sentence encoder is trained "
            "without them"
        )
    encoder = SentenceTransformer(str(source), device="cpu", model_kwargs={"dtype": dtype})
    if not torch.cuda.is_available():
        use_onednn(encoder)
    return encoder


def make_engine(config: LearnerConfig, model: Any, ds_config: dict[str, Any]) -> Any:
    """The model's DeepSpeed engine, with its optimiser."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    engine, *_ = import_deepspeed().initialize(
        model=model, optimizer=optimizer, model_parameters=trainable, config=ds_config
    )
    return engine


def offload_training_state(engine: Any) -> None:
    """Everything of a DeepSpeed engine but its weights, to the host's memory (`engine.reload_states` undoes it)."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

    engine.offload_states(
        include=[State.optim_states, State.hp_params, State.lp_grads, State.contiguous_grad_buffer]
    )
    torch.cuda.empty_cache()


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every random number generator of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
