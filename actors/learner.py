"""One rank of the DeepSpeed learner: the M-step of ExSearch.

Guarantees, whatever the ZeRO stage, the number of ranks and the token budget of a pack:

- the gradient of an optimiser step is that of the globally normalised loss of `pipeline.core.losses`;
- examples of a packed row never see each other, also where what they begin with in common is computed once;
- a run that is killed, loaded from its last checkpoint and continued ends with the same weights (bit for
  bit on CPU in float32) as one that was never stopped;
- no gradient that is not finite reaches a weight, and no weight that is not finite reaches a disk.

Every method but `progress` is collective: all ranks call it, with the same arguments. `Learner` needs no Ray;
`actors.learner_rank.LearnerRank` is the same class as a Ray actor.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors import allocator, learner_files, learner_setup, learner_state, learner_weights
from actors.checkpointer import Checkpointer
from actors.collectives import gathered, on_rank_zero
from actors.latent_adapters import LatentAdapters
from actors.learner_examples import PhaseExamples
from actors.learner_gradients import GradientsApart
from actors.learner_outputs import LiveReference, ModelOutputs, Sums, rows_of
from actors.weight_transfer import Bucket
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import LatentTasks
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.loss import Loss, Outputs, Prepared, Terms
from pipeline.core.packing import OptimizerStep, PackedBatch, collate, packing_efficiency
from pipeline.core.policies import Head
from pipeline.core.records import Example
from pipeline.core.schedule import learning_rate_at
from pipeline.core.training import TrainReport
from pipeline.core.training_phase import Phase, phase_key

logger = logging.getLogger(__name__)


class Learner:
    """A model with a head, its optimiser and its DeepSpeed engine, on one rank.

    The optimiser's moments live through all M-steps (training is continual); the learning-rate schedule
    starts again with each call of `train`.

    Args:
        config: `learner` section of the configuration.
        model_path: Hugging Face model directory or hub name to start from.
        rank, world_size, local_rank: this process among all ranks; the number of its GPU.
        store_address: of the store where the ranks meet (`learner_setup.open_store`); None: it is the only rank.
        seed: of adapters and dropout.
        head: what the model computes.
        latent: latent tasks that the model is to have.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        store_address: tuple[str, int] | None = None,
        local_rank: int = 0,
        seed: int = 0,
        head: Head = "lm",
        latent: LatentTasks | None = None,
    ) -> None:
        allocator.heed_settings()
        learner_setup.import_deepspeed()
        self.config, self.rank, self.world_size, self.head = config, rank, world_size, head
        self.device = learner_setup.join_process_group(
            store_address, rank=rank, world_size=world_size, local_rank=local_rank
        )
        torch.set_num_threads(config.threads_per_rank or learner_setup.fair_share_of_threads())
        self.dtype = learner_setup.resolve_dtype(config, self.device)
        ds_config = learner_setup.deepspeed_config(config, self.dtype)
        self.zero_stage: int = ds_config["zero_optimization"]["stage"]
        self.source = learner_files.local_directory(model_path)
        self._progress: dict[str, float] = {"step": 0, "num_steps": 0, "resumed_at": 0}
        self._resting = False
        self._phase: Phase | None = None  # the last M-step
        self._resume: Phase | None = None  # the same, out of a checkpoint that was just loaded

        learner_setup.seed_everything(seed)  # the same on all ranks: adapters start equal
        self.model, self._zero_init = learner_setup.load_model(
            config, self.source, self.dtype, ds_config, head
        )
        self.latent = LatentAdapters(self.model, latent) if latent is not None else None
        self.engine = learner_setup.make_engine(config, self.model, ds_config)
        self.outputs = ModelOutputs(self.engine, self.model, self.device, self.latent)
        self._reference = LiveReference(
            lambda source: learner_setup.load_frozen(
                config, source, self.dtype, self.device, self._zero_init
            ),
            self.device,
        )
        self._shares_prefixes = config.share_prefixes and self.outputs.can_share_prefixes
        self._checkpoints = Checkpointer()
        learner_setup.seed_everything(seed + rank)

    # ---------------------------------------------------------------- training

    def train(
        self,
        examples: Sequence[Example] | Sequence[str | Path],
        loss: Loss | Joint,
        *,
        phase_seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        checkpoints: str | Path | None = None,
        start: str | Path | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> TrainReport:
        """One phase of training: `epochs` passes over the examples.

        Behind a checkpoint from the middle of this very phase (same examples, loss, seed and settings) it goes on with
        the next step; behind one from its end, it returns at once. That may be one that `load` has just loaded, or the
        one in `checkpoints`.

        Args:
            examples: records, or Parquet shards of them. Every rank reads of these what it will compute itself.
            loss: what is minimised: one loss, or one for the examples of each role.
            phase_seed: seed of the order of the examples.
            learning_rate, epochs: in place of the configured ones.
            checkpoints: where one is written every `learner.checkpoint_minutes`, while training goes on; one of another
                phase there is overwritten. The last one may not count yet when this returns: see `save`.
            start: a checkpoint to load first, unless `checkpoints` has one of this phase.
            on_step: called on each rank after each optimiser step, with that step's metrics.

        Raises:
            UserError: a unit does not fit the token budget, an example has not the streams that the loss needs, or a
                checkpoint could not be written; conflicts are to be projected at ZeRO stage 3.
            FloatingPointError: the loss or the gradient of more than `learner.max_skipped_steps` steps is not finite.
                No weight has changed by it.
        """
        latent_tasks = self.latent.tasks if self.latent is not None else 0
        records = PhaseExamples(
            examples, loss, self.head, share_prefixes=self._shares_prefixes, latent_tasks=latent_tasks
        )
        outlines, objectives = records.outlines, records.objectives
        projects = isinstance(loss, Joint) and loss.project_conflicts
        if projects and self.zero_stage == 3:
            raise UserError(
                "gradients of a joint loss are projected on all trained weights at once, which ZeRO stage 3 cuts up; "
                "set learner.zero_stage to 2 or less"
            )
        peak, prepared = learning_rate or self.config.learning_rate, objectives.prepare(outlines)
        # An example that is not computed counts in its batch's normaliser only: it has no length to compute.
        lengths = [o.length if c else 0 for o, c in zip(outlines, prepared.computed, strict=True)]
        if not any(lengths):
            logger.warning("no training example has a say: the phase leaves the model as it is")
        plan = records.plan(lengths, self.config, phase_seed, epochs) if any(lengths) else []

        key = phase_key(records.digests, loss, phase_seed, peak, len(plan))
        phase = self._enter_phase(key, checkpoints, start)
        where = {"num_steps": len(plan), "resumed_at": phase.resumed_at}
        self._progress = {"step": len(phase.history), **where}
        to_do = plan[len(phase.history) :]
        own = records.load(k for step in to_do for pack in step.packs[self.rank] for k in pack)
        self._end_rest()
        self.engine.train()
        last_checkpoint = time.monotonic()
        for step in to_do:
            started = time.perf_counter()
            rate = learning_rate_at(
                len(phase.applied),
                len(plan),
                peak=peak,
                warmup_ratio=self.config.warmup_ratio,
                min_ratio=self.config.min_learning_rate_ratio,
            )
            phase.history.append(self._optimizer_step(step, own, records, prepared, rate, projects))
            phase.seconds += time.perf_counter() - started
            self._progress = {"step": len(phase.history), **where, **phase.history[-1]}
            if phase.skipped > self.config.max_skipped_steps:
                self.finish_checkpoint()
                raise FloatingPointError(
                    self._too_many_skipped(phase, len(plan), [outlines[k].id for k in step.examples])
                )
            if on_step is not None:
                on_step(phase.history[-1])
            self._checkpoints.settle()
            if checkpoints and len(phase.history) < len(plan) and self._checkpoint_is_due(last_checkpoint):
                self.checkpoint(checkpoints)
                last_checkpoint = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine on the same GPU may need what this phase does not use any more

        fill, balance = packing_efficiency(plan, self.config.tokens_per_microbatch)
        computed = [k for step in plan for k in step.examples if lengths[k]]
        return TrainReport(
            examples=len(outlines),
            skipped_examples=lengths.count(0),
            learning_rate=peak,
            steps=len(phase.history),
            skipped_steps=phase.skipped,
            resumed_at=phase.resumed_at,
            damaged_checkpoints=phase.problems,
            averages=phase.averages(),
            trained_tokens=sum(outlines[k].num_targets for k in computed),
            total_tokens=sum(lengths[k] for k in computed),
            seconds=phase.seconds,
            pack_fill=fill,
            rank_balance=balance,
            history=phase.history,
        )

    def rest(self) -> None:
        """Move what only training needs (master weights, optimiser state, gradients) to the host's memory.

        The weights stay, so that they can be pushed and exported; `train` takes everything back, and loads a live
        reference again. Nothing happens on CPUs; an optimiser that lives on the host anyway stays as it is.
        """
        if self.device.type != "cuda":
            return
        self._reference.drop()
        torch.cuda.empty_cache()
        if not (self._resting or self.config.offload_optimizer):
            learner_setup.offload_training_state(self.engine)
            self._resting = True

    def _end_rest(self) -> None:
        if self._resting:
            self.engine.reload_states()
            self._resting = False

    def progress(self) -> dict[str, float]:
        """Where the M-step that runs, or has just ended, stands: step, num_steps, resumed_at (the step behind
        which these ranks began), the last step's metrics."""
        return self._progress

    def _enter_phase(self, key: str, checkpoints: str | Path | None, start: str | Path | None) -> Phase:
        """The M-step `key`: as far as a checkpoint has it that is whole, or from its beginning."""
        problems: list[str] = []
        found = None
        if (
            checkpoints
            and on_rank_zero(lambda: learner_files.facts_of(Path(checkpoints))).get("phase") == key
        ):
            found, problems = self._checkpoints.whole(Path(checkpoints), key)
        if checkpoints and found is not None:
            self._load(Path(checkpoints), found)
        elif start is not None:
            self.load(start)
        resumed, self._resume = self._resume, None
        if resumed is not None and resumed.key == key:
            self._phase = replace(resumed, resumed_at=len(resumed.history), problems=problems)
        else:
            self._phase = Phase(key, problems=problems)
        return self._phase

    def _checkpoint_is_due(self, last: float) -> bool:
        """Whether rank 0's clock says so: all ranks must decide alike."""
        if not self.config.checkpoint_minutes:
            return False
        return on_rank_zero(lambda: time.monotonic() - last >= 60 * self.config.checkpoint_minutes)

    def _too_many_skipped(self, phase: Phase, num_steps: int, examples: Sequence[str]) -> str:
        return (
            f"optimiser step {len(phase.history)} of {num_steps} has a gradient that is not finite (loss "
            f"{phase.history[-1]['loss']:.4g}) and was left out; that makes {phase.skipped} such steps, more than "
            f"learner.max_skipped_steps: {self.config.max_skipped_steps}. Its examples are {', '.join(examples)}. No "
            "weight was changed by it. Look at these examples, or raise that key: the same command goes on from the "
            "last checkpoint."
        )

    def _optimizer_step(
        self,
        step: OptimizerStep,
        own: Mapping[int, Example],
        records: PhaseExamples,
        prepared: Prepared,
        learning_rate: float,
        projects: bool,
    ) -> dict[str, float]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        parts, of_example = records.objectives.parts, records.objectives.of_example
        sizes = [0.0] * len(parts)
        for k in step.examples:
            sizes[of_example[k]] += prepared.sizes[k]
        packs, sums = step.packs[self.rank], Sums(self.device)
        apart = GradientsApart(self.engine, self.model, parts, self.device, self.latent) if projects else None
        total, metrics = math.nan, dict[str, float]()
        for index, (pack, kind) in enumerate(zip(packs, step.kinds, strict=True)):
            last, part = index == len(packs) - 1, parts[kind]
            row = collate(
                pack,
                own,
                part.loss.streams,
                prepared.streams,
                share_prefixes=self._shares_prefixes,
                latent_tasks=self.latent.tasks if self.latent is not None else 0,
            )
            outputs = self.outputs if apart is None else apart.outputs
            terms = self._terms(row, part, max(1, sizes[kind]), outputs)
            sums.add(terms)
            if last:
                total, metrics = sums.over_all_ranks()
            # A loss that is not finite has no gradient that is, whatever autograd made of it: the step must be left
            # out.
            finite = not last or math.isfinite(total)
            if apart is not None:
                apart.add(kind, terms.loss)
            if apart is None or last:
                self.engine.set_gradient_accumulation_boundary(last)
                # DeepSpeed averages gradients over the ranks; the loss is a sum over them.
                loss = terms.loss * self.world_size if apart is None else apart.joined()
                self.engine.backward(loss if finite else loss * math.nan)
        if apart is not None:
            metrics["conflicts"] = float(apart.conflict)
        return {
            "loss": total,
            **metrics,
            "tokens": max(1, sum(sizes)),
            "grad_norm": self._apply_gradient(),
            "learning_rate": learning_rate,
        }

    def _apply_gradient(self) -> float:
        """The optimiser's step; the norm of the gradient, over all ranks.

        Where that is not finite nothing changes, and the gradient is dropped. DeepSpeed's own optimisers, of ZeRO
        stages 1 to 3 and of bfloat16, do so by themselves; torch's, under stage 0, takes anything.
        """
        if self.zero_stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def _terms(self, batch: PackedBatch, part: Part, normaliser: float, outputs: ModelOutputs) -> Terms:
        """A packed row's share of the loss. An empty one still runs, and weighs nothing."""
        predicted = outputs.of(batch, part.loss.output)
        if not len(batch.unit):
            return Terms(predicted.sum() * 0.0)
        reference = self._reference.of(part.loss, batch)
        terms = part.loss.terms(Outputs(predicted, reference), rows_of(batch, self.device), normaliser)
        if not part.role:
            return terms
        own = {f"{part.role}/{name}": value for name, value in terms.metrics.items()}
        return Terms(terms.loss * part.coefficient, own)

    # ------------------------------------------------------------- checkpoints

    def checkpoint(self, path: str | Path) -> None:
        """Begin a checkpoint in directory `path` of what the learner is now; training goes on while it is written.

        Weights and moments (`learner_state`), the random number generators of every rank and the position in the
        M-step. `path` must be on a file system that all ranks share. It counts, and replaces the one that is there, at
        the end of a later step, or with `save`.

        Raises:
            FloatingPointError: a weight is not finite.
            UserError: the checkpoint that was begun before could not be written.
        """
        self._begin_checkpoint(Path(path), keeps_before=True)

    def save(self, path: str | Path, model: str | Path | None = None) -> None:
        """As `checkpoint`, and wait until it counts; with `model`, the model is exported there meanwhile.

        Raises:
            FloatingPointError: a weight is not finite.
            UserError: a rank could not write; the checkpoint before is still there. Or the model could not be written;
                then the checkpoint counts.
        """
        self._begin_checkpoint(Path(path), keeps_before=False)
        if model is not None:
            try:
                self.export(model)
            except (UserError, FloatingPointError):  # of all ranks: training need not be done again for it
                self.finish_checkpoint()
                raise
        self.finish_checkpoint()

    def finish_checkpoint(self) -> None:
        """Wait until the checkpoint that was begun counts.

        Raises:
            UserError: a rank could not write; the checkpoint before is still there.
        """
        self._checkpoints.finish()

    def _begin_checkpoint(self, directory: Path, *, keeps_before: bool) -> None:
        self._end_rest()
        self._check_weights()
        phase = self._phase or Phase("")
        state = {
            "phase": self._phase and asdict(self._phase),
            "adam_steps": learner_state.adam_steps(self.engine),
            "rng": learner_setup.rng_state(),
        }
        facts = {
            "phase": phase.key,
            "step": len(phase.history),
            "num_ranks": self.world_size,
            "zero_stage": self.config.zero_stage,
        }
        self._checkpoints.begin(directory, self.engine, state, facts, keeps_before=keeps_before)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint that `save` wrote, on any number of ranks and at any ZeRO stage.

        A rank that the checkpoint does not know keeps its own random number generators.

        Raises:
            UserError: no complete checkpoint there, a damaged one, or one of a model with other trained parameters.
        """
        found, problems = self._checkpoints.whole(Path(path))
        if found is None:
            raise UserError(
                f"{path}: {problems[0]}. Copy the directory back from where it is whole; without one, start another "
                "run from the exported model beside it"
            )
        self._load(Path(path), found)

    def _load(self, directory: Path, facts: Mapping[str, Any]) -> None:
        slot, is_known = directory / facts["slot"], self.rank < facts["num_ranks"]
        state = torch.load(slot / f"rank_{self.rank if is_known else 0}.pt", weights_only=False)
        learner_state.read(self.engine, slot, state["adam_steps"])
        self._resume = self._phase = Phase(**state["phase"]) if state["phase"] else None
        if is_known:
            learner_setup.set_rng_state(state["rng"])

    # ------------------------------------------------------------ weights, out

    def export(self, path: str | Path) -> None:
        """Rank 0 writes a directory that others open, atomically: a Hugging Face model (safetensors, configuration,
        tokenizer), or a sentence-transformers one of an embedding head.

        Adapters are merged: whoever opens the directory needs no LoRA support.

        Raises:
            FloatingPointError: a weight is not finite.
            UserError: it could not be written; what was there before is still there.
        """
        self._check_weights()
        if self.head == "embedding":
            with learner_weights.gathered(list(self.model.parameters()), self.zero_stage == 3):
                on_rank_zero(
                    lambda: learner_files.replace_directory(
                        Path(path), lambda at: self.model.save_pretrained(str(at), create_model_card=False)
                    )
                )
            return
        state: dict[str, torch.Tensor] = {}
        for bucket in self.named_weights():
            if self.rank == 0:
                # Parameters may lie in one buffer of DeepSpeed's, and safetensors takes none that share memory.
                state.update((name, tensor.to("cpu", copy=True)) for name, tensor in bucket)
        config, source = self.model.config, self.source
        on_rank_zero(
            lambda: learner_files.replace_directory(
                Path(path), lambda at: learner_files.write_model(at, state, config, source)
            )
        )

    def named_weights(
        self, bucket_bytes: int = 256 << 20, dtype: torch.dtype | None = None
    ) -> Iterator[Bucket]:
        """Buckets of (name in a Hugging Face checkpoint, whole tensor); see `learner_weights`.

        Args:
            dtype: of the tensors; None: as trained.
        """
        return learner_weights.named_weights(
            self.model, bucket_bytes, dtype or self.dtype, partitioned=self.zero_stage == 3
        )

    def largest_tensor_bytes(self) -> int:
        """Size of the largest tensor of `named_weights`."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        return max(sizes) * self.dtype.itemsize

    def _check_weights(self) -> None:
        """
        Raises:
            FloatingPointError: on all ranks, if a weight is not finite on any.
        """
        names = {name for some in gathered(learner_weights.not_finite(self.model)) for name in some}
        if names:
            raise FloatingPointError(
                f"{len(names)} parameters have weights that are not finite, such as {min(names)}; they were not written"
            )

    def shutdown(self) -> None:
        """Finish the checkpoint that is being written, and leave the process group."""
        self._checkpoints.close()
        self.engine.destroy()
        dist.destroy_process_group()
