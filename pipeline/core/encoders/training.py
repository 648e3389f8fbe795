"""One phase of training of a sentence encoder, by sentence-transformers' own trainer.

    python -m pipeline.core.encoders.training JOB.json DRIVER     what each process of several runs

Guarantees:
- a phase that was cut off goes on behind its last whole checkpoint, and ends with the same weights (on a CPU);
- the model is there whole or not at all;
- several processes end within seconds of the one that began them (DRIVER, its number), however that ends;
- pooling, prefixes and the longest input are those of the model that it starts from: `Encoder` opens it as it was
  trained.

The loss is InfoNCE over a row's own negatives and those of the other rows of the batch, of all processes:

    L = - log exp(s(q, p+) / tau)  /  sum over p of the batch  exp(s(q, p) / tau)

with s the cosine. Rows that share a text are not put into the same batch (of one process), for a relevant passage of
the one would be a negative of the other. One process trains on every row in every epoch. Several, or one on a machine
with several GPUs, have batches of one size, to see each other's: what fills none is left out of the epoch, and counted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import RunError
from retriever_service.files import writing

OnProgress = Callable[[int, int], None]
"""(steps done, of how many)."""

_WHOLE = "WHOLE"
"""Written into a checkpoint when all of it is there."""
_FIGURES = "figures.json"
_MODULE = "pipeline.core.encoders.training"


@dataclass(frozen=True, slots=True)
class EncoderPhase:
    """What one phase is made of; all that is needed to run it in any process.

    model: directory or hub name. rows: Parquet of the columns anchor, positive, negative_1, ..., texts as the encoder
    is to see them, prefixes included. out: directory of the trained model. work: directory of checkpoints.
    query_prefix, passage_prefix: written into the model, for who opens it. batch_size: rows of a step, of each
    process. mini_batch: so many texts at a time go through the model (gradients are cached); None: all at once.
    temperature: tau. warmup: share of the steps. checkpoint_steps: between two checkpoints.
    """

    model: str
    rows: str
    out: str
    work: str
    query_prefix: str
    passage_prefix: str
    epochs: int
    batch_size: int
    mini_batch: int | None
    learning_rate: float
    warmup: float
    temperature: float
    max_length: int
    dtype: Literal["float32", "bfloat16", "float16"]
    checkpoint_steps: int
    processes: int
    seed: int


def train_encoder(phase: EncoderPhase, on_progress: OnProgress) -> dict[str, float]:
    """Do, or go on with, a phase; returns `steps`, `loss`, the mean of the last epoch's steps, and
    `left_over` (`batches_of`).

    Raises:
        RunError: the loss is not finite, or one of several processes fails; its words are on the terminal.
    """
    import torch

    work = Path(phase.work)
    work.mkdir(parents=True, exist_ok=True)
    # The trainer would spread one process over all GPUs that it sees, and so divide the batch.
    if phase.processes == 1 and torch.cuda.device_count() <= 1:
        _train(phase, on_progress)
    else:
        job = work / "job.json"
        job.write_text(json.dumps(asdict(phase)), encoding="utf-8")
        _launch(job, phase.processes)
    found: dict[str, float] = json.loads((work / _FIGURES).read_text(encoding="utf-8"))
    return found


def _launch(job: Path, processes: int) -> None:
    """The phase in processes of their own, which torch starts, watches and ends together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--master-port={port}", "-m", _MODULE, str(job), str(os.getpid())]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise RunError(f"training in {processes} processes ends with exit code {done.returncode}")


def loss_of(phase: EncoderPhase, model: Any) -> Any:
    """The loss of the module's head, of a SentenceTransformer."""
    from sentence_transformers.sentence_transformer import losses

    how: dict[str, Any] = {"scale": 1 / phase.temperature, "gather_across_devices": phase.processes > 1}
    if phase.mini_batch is None:
        return losses.MultipleNegativesRankingLoss(model, **how)
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=phase.mini_batch, **how)


def _train(phase: EncoderPhase, on_progress: OnProgress) -> None:
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    work, on_gpu = Path(phase.work), torch.cuda.is_available()
    model = SentenceTransformer(
        phase.model, device="cuda" if on_gpu else "cpu", model_kwargs={"dtype": "float32"}
    )
    model.max_seq_length = phase.max_length
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(work),
        num_train_epochs=phase.epochs,
        per_device_train_batch_size=phase.batch_size,
        learning_rate=phase.learning_rate,
        warmup_steps=phase.warmup,
        bf16=phase.dtype == "bfloat16",
        fp16=phase.dtype == "float16",
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=phase.checkpoint_steps,
        save_total_limit=2,  # the one before stays until the new one is marked as whole
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show the mean of other steps in their place
        report_to=[],
        disable_tqdm=True,
        seed=phase.seed,
    )

    class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
        left_over = 0

        def get_batch_sampler(self, dataset: Any, **how: Any) -> Any:
            batches = batches_of(dataset, phase.epochs, phase.processes, **how)
            self.left_over = batches.left_over
            return batches

    rows = Dataset.from_parquet(phase.rows, cache_dir=str(work / "cache"))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=loss_of(phase, model),
        callbacks=[_callback(on_progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it would write to standard output
    trainer.train(resume_from_checkpoint=_last_whole(work))
    if trainer.is_world_process_zero():
        _finish(phase, model, trainer.state, trainer.left_over)


def _finish(phase: EncoderPhase, model: Any, state: Any, left_over: int) -> None:
    out = Path(phase.out)
    model.prompts = {"query": phase.query_prefix, "document": phase.passage_prefix}
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), create_model_card=False)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    logged = [row["loss"] for row in state.log_history if "loss" in row and row["epoch"] > phase.epochs - 1]
    figures = {
        "steps": state.global_step,
        "loss": sum(logged) / max(1, len(logged)),
        "left_over": left_over,
    }
    with writing(Path(phase.work) / _FIGURES) as file:
        file.write(json.dumps(figures).encode())


def batches_of(
    dataset: Any, epochs: int, processes: int, *, batch_size: int, seed: int, drop_last: bool, **how: Any
) -> Any:
    """The library's batches of rows that share no text, and as many of them as the rows need.

    The library reckons with full batches, the trainer leaves out what goes beyond its reckoning, and rows that share
    texts need more. An epoch that needs fewer than another one repeats some rows.

    Returns:
        The sampler; `left_over`: rows of all epochs together that no full batch takes, where there must be no others
        (`drop_last`).

    Raises:
        RunError: no batch is full, where all must be.
    """
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    counted = NoDuplicatesBatchSampler(
        dataset, batch_size, generator=torch.Generator(), seed=seed, drop_last=drop_last
    )
    most = rows = 0
    for epoch in range(epochs):
        counted.set_epoch(epoch)
        sizes = [len(batch) for batch in counted]
        most, rows = max(most, len(sizes)), rows + min(len(dataset), sum(sizes))
    if not most:
        raise RunError(
            f"there are too few rows without a text in common for batches of {batch_size}; take smaller ones"
        )

    class Batches(NoDuplicatesBatchSampler):  # type: ignore[misc]
        left_over = epochs * len(dataset) - rows

        def __len__(self) -> int:
            return -(-most // processes) * processes

    return Batches(dataset, batch_size, seed=seed, drop_last=drop_last, **how)


def _last_whole(work: Path) -> str | None:
    """The newest checkpoint; one that was cut off is removed."""
    whole: dict[int, Path] = {}
    for path in work.glob("checkpoint-*"):
        if (path / _WHOLE).exists():
            whole[int(path.name.rpartition("-")[2])] = path
        elif int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None


def _callback(on_progress: OnProgress) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_progress(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                raise RunError(
                    f"the loss of step {state.global_step} is {logs['loss']}; begin another run, with a lower "
                    "learning rate"
                )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                Path(args.output_dir, f"checkpoint-{state.global_step}", _WHOLE).touch()

    return Told()


def end_with(driver: int) -> None:
    """End this process soon after that one, or its own parent, is gone: a training that goes on by itself would write
    into the directory of the next one."""
    parent = os.getppid()

    def watch() -> None:
        while Path(f"/proc/{driver}").exists() and os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    _train(
        EncoderPhase(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), lambda done, total: None
    )
