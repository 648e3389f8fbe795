"""One rank of the DeepSpeed learner: the M-step of ExSearch.

Guarantees, whatever the ZeRO stage, the number of ranks and the token budget of a pack:

- the gradient of an optimiser step is that of the globally normalised loss of `pipeline.core.losses`;
- examples of a packed row never see each other;
- a run that is killed, loaded from its last checkpoint and continued ends with the same weights (bit for
  bit on CPU in float32) as one that was never stopped.

Every method but `progress` and `rendezvous` is collective: all ranks call it, with the same arguments.
`Learner` needs no Ray; `LearnerRank` is the same class as a Ray actor.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import torch.distributed as dist

from actors import learner_files, learner_setup
from actors.weight_transfer import (
    Bucket,
    EngineRef,
    PushReport,
    RayEngines,
    SharedMemorySender,
    Transport,
    VllmSender,
    WeightSender,
)
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import iteration_weights, token_logprobs, weighted_nll
from pipeline.core.packing import (
    OptimizerStep,
    PackedBatch,
    collate,
    num_targets,
    packing_efficiency,
    plan_epoch,
)
from pipeline.core.records import WeightedExample, examples_from_table
from pipeline.core.schedule import learning_rate_at

logger = logging.getLogger(__name__)


class Learner:
    """A causal language model, its optimiser and its DeepSpeed engine, on one rank.

    The optimiser's moments live through all M-steps (training is continual); the learning-rate schedule
    starts again with each call of `train`.

    Args:
        config: `learner` section of the configuration.
        model_path: Hugging Face model directory or hub name to start from.
        rank, world_size, local_rank: this process among all ranks; the number of its GPU.
        master_addr, master_port: where rank 0 listens.
        seed: of adapters and dropout.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        local_rank: int = 0,
        seed: int = 0,
    ) -> None:
        deepspeed = learner_setup.import_deepspeed()
        from pipeline.core.attention import PACKED

        self.config, self.rank, self.world_size = config, rank, world_size
        self.device = learner_setup.join_process_group(
            master_addr, master_port, rank=rank, world_size=world_size, local_rank=local_rank
        )
        torch.set_num_threads(config.threads_per_rank or learner_setup.fair_share_of_threads())
        self.dtype = learner_setup.resolve_dtype(config, self.device)
        ds_config = learner_setup.deepspeed_config(config, self.dtype)
        self.zero_stage: int = ds_config["zero_optimization"]["stage"]
        self.source = learner_files.local_directory(model_path)
        self._progress: dict[str, float] = {"step": 0, "num_steps": 0}
        self._resting = False
        self._phase: dict[str, Any] | None = None  # key and history of the last M-step
        self._resume: dict[str, Any] | None = None  # the same, out of a checkpoint that was just loaded

        learner_setup.seed_everything(seed)  # the same on all ranks: adapters start equal
        self.model, self._zero_init = learner_setup.load_model(config, self.source, self.dtype, ds_config)
        self._packed_attention = self.model.config._attn_implementation == PACKED
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, model_parameters=trainable, config=ds_config
        )
        learner_setup.seed_everything(seed + rank)

    # ---------------------------------------------------------------- training

    def train(
        self,
        examples: Sequence[WeightedExample] | Sequence[str | Path],
        *,
        phase_seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        checkpoint_path: str | Path | None = None,
        checkpoint_every: int = 0,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> dict[str, Any]:
        """One M-step: `epochs` passes over the weighted examples.

        After `load` of a checkpoint from the middle of this very M-step (same examples, seed and settings) it
        goes on behind the last saved step; from its end, it returns at once.

        Args:
            examples: records, or Parquet shards of them that every rank reads itself.
            phase_seed: seed of the order of the examples.
            learning_rate, epochs: in place of the configured ones.
            checkpoint_path, checkpoint_every: save there after every so many optimiser steps (0: never).
            on_step: called on each rank after each optimiser step, with that step's metrics.

        Returns:
            examples, skipped_examples (negligible weight: counted in the normaliser, not computed), steps, loss
            (weighted NLL per trained token), nll (unweighted, of the computed examples), grad_norm (mean),
            learning_rate (peak), trained_tokens, total_tokens, seconds, trained_tokens_per_s and
            total_tokens_per_s (of the steps that this process ran), pack_fill and rank_balance
            (`packing_efficiency`), history (one dictionary per step: loss, nll, tokens, grad_norm, learning_rate).

        Raises:
            UserError: an example does not fit the token budget.
            FloatingPointError: the loss is not finite.
        """
        records = _read_examples(examples)
        peak = learning_rate or self.config.learning_rate
        num_tokens = [num_targets(e) for e in records]
        exact = iteration_weights([e.weight for e in records], num_tokens)
        weights = [v if v >= self.config.negligible_weight else 0.0 for v in exact]
        # A negligible example counts in its batch's normaliser only: it has no length to compute.
        lengths = [
            len(e.token_ids) if w and n else 0 for e, w, n in zip(records, weights, num_tokens, strict=True)
        ]
        if not any(lengths):
            logger.warning("no training example has a positive weight: the M-step leaves the model as it is")
        plan = self._plan(records, lengths, phase_seed, epochs or self.config.epochs) if any(lengths) else []

        history = self._enter_phase(_phase_key(records, phase_seed, peak, len(plan)))
        self._progress = {"step": len(history), "num_steps": len(plan)}
        self._end_rest()
        remaining, started = plan[len(history) :], time.perf_counter()
        self.engine.train()
        for step in remaining:
            rate = learning_rate_at(
                len(history),
                len(plan),
                peak=peak,
                warmup_ratio=self.config.warmup_ratio,
                min_ratio=self.config.min_learning_rate_ratio,
            )
            normaliser = max(1, sum(num_tokens[k] for k in step.examples))
            history.append(self._optimizer_step(step, records, weights, normaliser, rate))
            self._progress = {"step": len(history), "num_steps": len(plan), **history[-1]}
            if on_step is not None:
                on_step(history[-1])
            if checkpoint_path and checkpoint_every and len(history) % checkpoint_every == 0:
                self.save(checkpoint_path)
        seconds = time.perf_counter() - started
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine on the same GPU may need what this phase does not use any more

        fill, balance = packing_efficiency(plan, lengths, self.config.tokens_per_microbatch)
        computed = [k for step in remaining for k in step.examples if lengths[k]]
        trained, total = (sum(counts[k] for k in computed) for counts in (num_tokens, lengths))
        return {
            "examples": len(records),
            "skipped_examples": lengths.count(0),
            "learning_rate": peak,
            **_averages(history),
            "trained_tokens": trained,
            "total_tokens": total,
            "seconds": seconds,
            "trained_tokens_per_s": trained / seconds,
            "total_tokens_per_s": total / seconds,
            "pack_fill": fill,
            "rank_balance": balance,
            "history": history,
        }

    def rest(self) -> None:
        """Move what only training needs (master weights, optimiser state, gradients) to the host's memory.

        The weights stay, so that they can be pushed and exported; `train` takes everything back. Nothing happens on
        CPUs and where the optimiser lives on the host anyway.
        """
        if self.device.type == "cuda" and not (self._resting or self.config.offload_optimizer):
            learner_setup.offload_training_state(self.engine)
            self._resting = True

    def _end_rest(self) -> None:
        if self._resting:
            self.engine.reload_states()
            self._resting = False

    def progress(self) -> dict[str, float]:
        """Where the M-step that runs, or has just ended, stands: step, num_steps, the last step's metrics."""
        return self._progress

    def _plan(
        self, records: Sequence[WeightedExample], lengths: Sequence[int], phase_seed: int, epochs: int
    ) -> list[OptimizerStep]:
        names = [f"{e.question_id}/{e.sample}" for e in records]
        return [
            step
            for epoch in range(epochs)
            for step in plan_epoch(
                lengths,
                batch_size=self.config.batch_size,
                world_size=self.world_size,
                token_budget=self.config.tokens_per_microbatch,
                seed=(phase_seed, epoch),
                names=names,
            )
        ]

    def _enter_phase(self, key: str) -> list[dict[str, float]]:
        """History of the M-step `key`: what a loaded checkpoint has of it, or nothing yet."""
        resumed, self._resume = self._resume, None
        history = list(resumed["history"]) if resumed and resumed["key"] == key else []
        self._phase = {"key": key, "history": history}
        return history

    def _optimizer_step(
        self,
        step: OptimizerStep,
        records: Sequence[WeightedExample],
        weights: Sequence[float],
        normaliser: int,
        learning_rate: float,
    ) -> dict[str, float]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        packs = step.packs[self.rank]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, -sum log p, its tokens
        for index, pack in enumerate(packs):
            self.engine.set_gradient_accumulation_boundary(index == len(packs) - 1)
            logprobs, token_weights = self._forward(collate(pack, records, weights))
            loss = weighted_nll(logprobs, token_weights, normaliser)
            # DeepSpeed averages gradients over the ranks; the loss is a sum over them.
            self.engine.backward(loss * self.world_size)
            computed = token_weights > 0
            sums += torch.stack([loss.detach(), -logprobs.detach()[computed].sum(), computed.sum()])
        dist.all_reduce(sums)
        loss_sum, nll_sum, num_computed = sums.tolist()
        if not math.isfinite(loss_sum):
            raise FloatingPointError(
                f"the loss of the optimiser step on examples {step.examples} is {loss_sum}"
            )
        # ZeRO's optimisers report the norm that they clip by; plain data parallelism (stage 0) does not.
        grad_norm = self._grad_norm() if self.zero_stage == 0 else None
        self.engine.step()
        return {
            "loss": loss_sum,
            "nll": nll_sum / max(1, num_computed),
            "tokens": normaliser,
            "grad_norm": float(self.engine.get_global_grad_norm() if grad_norm is None else grad_norm),
            "learning_rate": learning_rate,
        }

    def _forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and weights of the batch's M target tokens: two tensors [M]."""
        on_device = {
            name: torch.from_numpy(getattr(batch, name)).to(self.device)
            for name in ("input_ids", "position_ids", "predictors", "targets", "token_weights")
        }
        output = self.engine(
            input_ids=on_device["input_ids"],
            position_ids=on_device["position_ids"],
            logits_to_keep=on_device["predictors"],
            use_cache=False,  # with a cache transformers does not look for packed examples in position_ids
            **({"segment_lengths": batch.segment_lengths} if self._packed_attention else {}),
        )
        return token_logprobs(output.logits[0], on_device["targets"]), on_device["token_weights"]

    def _grad_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    # ------------------------------------------------------------- checkpoints

    def save(self, path: str | Path) -> None:
        """Write all that is needed to go on to directory `path`, replacing a checkpoint there atomically.

        DeepSpeed's state (weights, optimiser), the random number generators of every rank and the position in
        the M-step. `path` must be on a file system that all ranks share.
        """
        self._end_rest()
        directory = Path(path)
        slot = self._on_rank_zero(lambda: learner_files.free_slot(directory))
        self.engine.save_checkpoint(
            str(directory),
            tag=slot,
            save_latest=False,
            exclude_frozen_parameters=self.config.lora is not None,
        )
        state = {"phase": self._phase, "rng": learner_setup.rng_state()}
        torch.save(state, directory / slot / f"rank_{self.rank}.pt")
        dist.barrier()
        self._on_rank_zero(lambda: learner_files.commit_slot(directory, slot, self._layout()))

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint that `save` wrote. The learner must not have trained or saved before.

        Raises:
            UserError: no complete checkpoint there, or one of another layout (ranks, ZeRO stage, number
                format).
        """
        directory = Path(path)
        slot = learner_files.committed_slot(directory, self._layout())
        loaded, _ = self.engine.load_checkpoint(
            str(directory),
            tag=slot,
            load_module_strict=self.config.lora is None,
            load_lr_scheduler_states=False,
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not read the learner's checkpoint {directory / slot}")
        state = torch.load(directory / slot / f"rank_{self.rank}.pt", weights_only=False)
        self._resume = self._phase = state["phase"]
        learner_setup.set_rng_state(state["rng"])

    def _layout(self) -> dict[str, Any]:
        """What a checkpoint and the learner that loads it must share: configuration key -> value."""
        return {
            "learner.num_ranks": self.world_size,
            "learner.zero_stage": self.zero_stage,
            "learner.dtype": str(self.dtype).removeprefix("torch."),
            "learner.lora": self.config.lora.model_dump(mode="json") if self.config.lora else None,
        }

    # ------------------------------------------------------------ weights, out

    def export(self, path: str | Path) -> None:
        """Rank 0 writes a Hugging Face model directory (safetensors, configuration, tokenizer), atomically.

        Adapters are merged: whoever opens the directory needs no LoRA support.
        """
        state: dict[str, torch.Tensor] = {}
        for bucket in self.named_weights():
            if self.rank == 0:
                state.update((name, tensor.cpu()) for name, tensor in bucket)
        config, source = self.model.config, self.source
        self._on_rank_zero(lambda: learner_files.write_model_directory(Path(path), state, config, source))

    def named_weights(
        self, bucket_bytes: int = 256 << 20, dtype: torch.dtype | None = None
    ) -> Iterator[Bucket]:
        """Buckets of (name in a Hugging Face checkpoint, copy of the whole tensor), adapters merged.

        Tied weights come once. All ranks must exhaust the iterator in step: under ZeRO-3 each bucket is
        gathered from all of them. The copies outlive the gathering and later training.

        Args:
            bucket_bytes: most bytes of a bucket; a larger tensor has one of its own.
            dtype: of the copies; None: as trained.
        """
        dtype = dtype or self.dtype
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            # numel() of a parameter that ZeRO-3 has partitioned is 0.
            num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * dtype.itemsize
            if bucket and size + num_bytes > bucket_bytes:
                yield self._copies(bucket, dtype)
                bucket, size = [], 0
            bucket.append((name, parameter))
            size += num_bytes
        yield self._copies(bucket, dtype)

    def largest_tensor_bytes(self) -> int:
        """Size of the largest tensor of `named_weights`."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        return max(sizes) * self.dtype.itemsize

    @torch.no_grad()
    def _copies(self, parameters: Sequence[tuple[str, torch.nn.Parameter]], dtype: torch.dtype) -> Bucket:
        # peft keeps the weight W of an adapted module under MODULE.base_layer.weight.
        adapted = {
            name: self.model.get_submodule(name.removesuffix(".base_layer.weight"))
            for name, _ in parameters
            if name.endswith(".base_layer.weight")
        }
        adapters = [p for m in adapted.values() for n, p in m.named_parameters() if n.startswith("lora_")]
        copies = []
        with self._gathered([parameter for _, parameter in parameters] + adapters):
            for name, parameter in parameters:
                if name in adapted:
                    delta = adapted[name].get_delta_weight("default")
                    tensor = (parameter.float() + delta.float()).to(dtype)
                else:
                    tensor = parameter.detach().to(dtype, copy=True)
                copies.append((name.replace(".base_layer.", "."), tensor))
        return copies

    def _gathered(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[Any] = (
            learner_setup.import_deepspeed().zero.GatheredParameters(parameters)
        )
        return gathered

    def _on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0; all ranks get its result, or its OSError: a full disk leaves nobody waiting."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [work()]
            except OSError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]

    def shutdown(self) -> None:
        """Leave the process group."""
        self.engine.destroy()
        dist.destroy_process_group()


@ray.remote(concurrency_groups={"progress": 1})
class LearnerRank(Learner):
    """`Learner` as a Ray actor; `progress` has a thread of its own and answers while `train` runs."""

    @ray.method(concurrency_group="progress")
    def progress(self) -> dict[str, float]:
        return super().progress()

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a port that is free on it."""
        return learner_setup.free_address()

    def push(
        self,
        engines: Sequence[EngineRef],
        transport: Transport,
        version: int,
        master_addr: str,
        master_port: int,
        deadline_s: float,
    ) -> PushReport | None:
        """Send the weights to all engines as `version` (collective); the report comes from rank 0.

        Args:
            engines: whom to send to.
            transport: how.
            version: what the engines will say they serve.
            master_addr, master_port: rank 0's `rendezvous`, for a transport with a group of its own.
            deadline_s: the longest that the push may take, in seconds.

        Raises:
            WeightTransferError: an engine did not confirm the version in time.
        """
        receivers = RayEngines(engines, ray.get_runtime_context().get_node_id()) if self.rank == 0 else None
        sender: WeightSender
        if transport == "shared_memory":
            sender = SharedMemorySender(receivers, self.named_weights, deadline_s=deadline_s)
        else:
            sender = VllmSender(
                transport,
                receivers,
                self.named_weights,
                rank=self.rank,
                master_address=master_addr,
                master_port=master_port,
                deadline_s=deadline_s,
                largest_tensor_bytes=self.largest_tensor_bytes(),
            )
        return sender.push(version)


def _read_examples(examples: Sequence[WeightedExample] | Sequence[str | Path]) -> list[WeightedExample]:
    records: list[WeightedExample] = []
    for item in examples:
        records += [item] if isinstance(item, WeightedExample) else examples_from_table(pq.read_table(item))
    return records


def _phase_key(records: Sequence[WeightedExample], *settings: float) -> str:
    """Fingerprint of an M-step: a checkpoint from its middle is of use to this very M-step only."""
    digest = hashlib.sha256(repr(settings).encode())
    for record in records:
        digest.update(f"{record.question_id}/{record.sample} {record.weight!r}".encode())
        digest.update(record.token_ids.tobytes())
        digest.update(record.loss_mask.tobytes())
    return digest.hexdigest()


def _averages(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the optimiser steps of the M-step, of the losses per token. NaN if there were no steps."""
    tokens = [metrics["tokens"] for metrics in history]

    def mean(name: str, weights: list[float] | None = None) -> float:
        return float(np.average([m[name] for m in history], weights=weights)) if history else math.nan

    return {
        "steps": len(history),
        "loss": mean("loss", tokens),
        "nll": mean("nll", tokens),
        "grad_norm": mean("grad_norm"),
    }
