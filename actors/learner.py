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

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from actors import learner_files, learner_setup, learner_weights
from actors.learner_outputs import ModelOutputs, Sums, check_streams, read_examples, rows_of
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
from pipeline.core.losses.loss import Loss, Outputs, Prepared, Terms
from pipeline.core.packing import (
    OptimizerStep,
    PackedBatch,
    collate,
    packing_efficiency,
    plan_epoch,
)
from pipeline.core.policies import Head
from pipeline.core.records import Example
from pipeline.core.schedule import learning_rate_at
from pipeline.core.training import TrainReport

logger = logging.getLogger(__name__)


class Learner:
    """A model with a head, its optimiser and its DeepSpeed engine, on one rank.

    The optimiser's moments live through all M-steps (training is continual); the learning-rate schedule
    starts again with each call of `train`.

    Args:
        config: `learner` section of the configuration.
        model_path: Hugging Face model directory or hub name to start from.
        rank, world_size, local_rank: this process among all ranks; the number of its GPU.
        master_addr, master_port: where rank 0 listens.
        seed: of adapters and dropout.
        head: what the model computes.
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
        head: Head = "lm",
    ) -> None:
        deepspeed = learner_setup.import_deepspeed()
        self.config, self.rank, self.world_size, self.head = config, rank, world_size, head
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
        self._reference: tuple[str, ModelOutputs] | None = None  # a live reference and where it is from
        self._phase: dict[str, Any] | None = None  # key and history of the last M-step
        self._resume: dict[str, Any] | None = None  # the same, out of a checkpoint that was just loaded

        learner_setup.seed_everything(seed)  # the same on all ranks: adapters start equal
        self.model, self._zero_init = learner_setup.load_model(
            config, self.source, self.dtype, ds_config, head
        )
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
        self.outputs = ModelOutputs(self.engine, self.model, self.device)
        learner_setup.seed_everything(seed + rank)

    # ---------------------------------------------------------------- training

    def train(
        self,
        examples: Sequence[Example] | Sequence[str | Path],
        loss: Loss,
        *,
        phase_seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        checkpoint_path: str | Path | None = None,
        checkpoint_every: int = 0,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> TrainReport:
        """One phase of training: `epochs` passes over the examples.

        After `load` of a checkpoint from the middle of this very phase (same examples, loss, seed and settings) it
        goes on behind the last saved step; from its end, it returns at once.

        Args:
            examples: records, or Parquet shards of them that every rank reads itself.
            loss: what is minimised.
            phase_seed: seed of the order of the examples.
            learning_rate, epochs: in place of the configured ones.
            checkpoint_path, checkpoint_every: save there after every so many optimiser steps (0: never).
            on_step: called on each rank after each optimiser step, with that step's metrics.

        Raises:
            UserError: a unit does not fit the token budget, or an example has not the streams that the loss needs.
            FloatingPointError: the loss is not finite.
        """
        records = read_examples(examples)
        check_streams(records, loss, self.head)
        peak, prepared = learning_rate or self.config.learning_rate, loss.prepare(records)
        # An example that is not computed counts in its batch's normaliser only: it has no length to compute.
        lengths = [len(e.token_ids) if c else 0 for e, c in zip(records, prepared.computed, strict=True)]
        if not any(lengths):
            logger.warning("no training example has a say: the phase leaves the model as it is")
        plan = self._plan(records, lengths, phase_seed, epochs or self.config.epochs) if any(lengths) else []

        history = self._enter_phase(_phase_key(records, loss, phase_seed, peak, len(plan)))
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
            history.append(self._optimizer_step(step, records, loss, prepared, rate))
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
        return TrainReport(
            examples=len(records),
            skipped_examples=lengths.count(0),
            learning_rate=peak,
            steps=len(history),
            averages=_averages(history),
            trained_tokens=sum(records[k].num_targets for k in computed),
            total_tokens=sum(lengths[k] for k in computed),
            seconds=seconds,
            pack_fill=fill,
            rank_balance=balance,
            history=history,
        )

    def rest(self) -> None:
        """Move what only training needs (master weights, optimiser state, gradients) to the host's memory.

        The weights stay, so that they can be pushed and exported; `train` takes everything back, and loads a live
        reference again. Nothing happens on CPUs; an optimiser that lives on the host anyway stays as it is.
        """
        if self.device.type != "cuda":
            return
        if self._reference is not None:
            self._reference = None
            torch.cuda.empty_cache()
        if not (self._resting or self.config.offload_optimizer):
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
        self, records: Sequence[Example], lengths: Sequence[int], phase_seed: int, epochs: int
    ) -> list[OptimizerStep]:
        units = [example.unit for example in records]
        return [
            step
            for epoch in range(epochs)
            for step in plan_epoch(
                lengths,
                batch_size=self.config.batch_size,
                world_size=self.world_size,
                token_budget=self.config.tokens_per_microbatch,
                seed=(phase_seed, epoch),
                units=units,
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
        records: Sequence[Example],
        loss: Loss,
        prepared: Prepared,
        learning_rate: float,
    ) -> dict[str, float]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        normaliser = max(1, sum(prepared.sizes[k] for k in step.examples))
        packs, sums = step.packs[self.rank], Sums(self.device)
        for index, pack in enumerate(packs):
            self.engine.set_gradient_accumulation_boundary(index == len(packs) - 1)
            terms = self._terms(collate(pack, records, loss.streams, prepared.streams), loss, normaliser)
            # DeepSpeed averages gradients over the ranks; the loss is a sum over them.
            self.engine.backward(terms.loss * self.world_size)
            sums.add(terms)
        total, metrics = sums.over_all_ranks()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of the optimiser step on examples {step.examples} is {total}")
        # ZeRO's optimisers report the norm that they clip by; plain data parallelism (stage 0) does not.
        grad_norm = self._grad_norm() if self.zero_stage == 0 else None
        self.engine.step()
        return {
            "loss": total,
            **metrics,
            "tokens": normaliser,
            "grad_norm": float(self.engine.get_global_grad_norm() if grad_norm is None else grad_norm),
            "learning_rate": learning_rate,
        }

    def _terms(self, batch: PackedBatch, loss: Loss, normaliser: float) -> Terms:
        """A packed row's share of the loss. An empty one still runs, and weighs nothing."""
        predicted = self.outputs.of(batch, loss.output)
        if not len(batch.unit):
            return Terms(predicted.sum() * 0.0)
        reference = self._reference_logits(loss.reference, batch) if loss.reference is not None else None
        return loss.terms(Outputs(predicted, reference), rows_of(batch, self.device), normaliser)

    def _reference_logits(self, source: str, batch: PackedBatch) -> torch.Tensor:
        """Logits of a live reference [M, V]. It is loaded once and is never trained: no optimiser knows it."""
        if self._reference is None or self._reference[0] != source:
            self._reference = None  # one at a time
            model = learner_setup.load_frozen(self.config, source, self.dtype, self.device, self._zero_init)
            self._reference = source, ModelOutputs(model, model, self.device)
        with torch.no_grad():
            return self._reference[1].of(batch, "logits")

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
        """Rank 0 writes a directory that others open, atomically: a Hugging Face model (safetensors, configuration,
        tokenizer), or a sentence-transformers one of an embedding head.

        Adapters are merged: whoever opens the directory needs no LoRA support.
        """
        if self.head == "embedding":
            with learner_weights.gathered(list(self.model.parameters()), self.zero_stage == 3):
                self._on_rank_zero(
                    lambda: learner_files.replace_directory(
                        Path(path), lambda at: self.model.save_pretrained(str(at), create_model_card=False)
                    )
                )
            return
        state: dict[str, torch.Tensor] = {}
        for bucket in self.named_weights():
            if self.rank == 0:
                state.update((name, tensor.cpu()) for name, tensor in bucket)
        config, source = self.model.config, self.source
        self._on_rank_zero(
            lambda: learner_files.replace_directory(
                Path(path), lambda at: learner_files.write_model(at, state, config, source)
            )
        )

    def named_weights(
        self, bucket_bytes: int = 256 << 20, dtype: torch.dtype | None = None
    ) -> Iterator[Bucket]:
        """Buckets of (name in a Hugging Face checkpoint, copy of the whole tensor); see `learner_weights`.

        Args:
            dtype: of the copies; None: as trained.
        """
        return learner_weights.named_weights(
            self.model, bucket_bytes, dtype or self.dtype, partitioned=self.zero_stage == 3
        )

    def largest_tensor_bytes(self) -> int:
        """Size of the largest tensor of `named_weights`."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        return max(sizes) * self.dtype.itemsize

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
        receivers = None
        if self.rank == 0:
            node_id = ray.get_runtime_context().get_node_id()
            receivers = RayEngines(engines, node_id, may_miss=transport == "shared_memory")
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


def _phase_key(records: Sequence[Example], loss: Loss, *settings: float) -> str:
    """Fingerprint of a phase: a checkpoint from its middle is of use to this very phase only."""
    digest = hashlib.sha256(repr((loss, settings)).encode())
    for record in records:
        digest.update(f"{record.id} {record.unit}".encode())
        digest.update(record.token_ids.tobytes())
        digest.update(record.loss_mask.tobytes())
        for name in sorted(record.streams):
            digest.update(name.encode() + record.streams[name].tobytes())
    return digest.hexdigest()


def _averages(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the optimiser steps, of all but the gradient's norm by what a step's normaliser counts.

    A step in which nothing was computed has no metrics of the loss's own, and takes no part in their means.
    """
    if not history:
        return {"loss": math.nan, "grad_norm": math.nan}
    others = ("tokens", "grad_norm", "learning_rate")
    means = {}
    for name in dict.fromkeys(name for step in history for name in step if name not in others):
        steps = [step for step in history if name in step]
        sizes = [step["tokens"] for step in steps]
        means[name] = float(np.average([step[name] for step in steps], weights=sizes))
    return {**means, "grad_norm": float(np.average([step["grad_norm"] for step in history]))}
