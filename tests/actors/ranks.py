"""Real DeepSpeed ranks (gloo, CPU) for tests, each in a fresh process, and a tiny model and examples for them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from actors import learner_setup
from actors.learner import Learner
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import LatentTasks
from pipeline.core.losses.joint import Joint
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Loss
from pipeline.core.policies import Head
from pipeline.core.records import Example
from pipeline.core.training import TrainReport

VOCABULARY = 64
LONGEST = 40
CONFIG = LearnerConfig(
    zero_stage=0,
    dtype="float32",
    batch_size=5,
    epochs=2,
    learning_rate=1e-2,
    adam_epsilon=1e-3,  # the usual 1e-8 turns rounding of vanishing gradients into steps of full size
    weight_decay=0.1,
    gradient_clipping=1.0,
    tokens_per_microbatch=2 * LONGEST,
    threads_per_rank=1,
)
PROCESS_TIMEOUT_S = 240
AFTER_EACH_STEP = 1e-9
"""`checkpoint_minutes` that have always passed."""
Weights = dict[str, np.ndarray]
Result = tuple[TrainReport, Weights]


def make_examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Random examples; every fourth has weight 0, the others differ."""
    random = np.random.default_rng(seed)
    examples = []
    for k in range(count):
        length = int(random.integers(5, LONGEST + 1))
        mask = random.random(length) < 0.5
        mask[-1] = True
        token_ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        weight = {"log_weight": np.array([[-np.inf, np.log(0.3), 0.0, np.log(2.0)][k % 4]])}
        examples.append(Example(f"q{k}/0", f"q{k}/0", "policy", token_ids, mask, weight))
    return examples


def weight_of(example: Example) -> float:
    """w of an example that carries its logarithm."""
    return float(np.exp(example.number("log_weight")))


def build_model(path: Path, seed: int = 0) -> Path:
    """A random Qwen2 of two layers."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "training_log.txt").write_text("not part of a model")
    return path


def run_ranks(
    config: LearnerConfig,
    model: Path,
    scenario: Callable[..., Any],
    *args: Any,
    head: Head = "lm",
    latent: LatentTasks | None = None,
) -> Any:
    """Run `scenario(learner, *args)` on `config.num_ranks` ranks; the result of rank 0. Raises what a rank raised."""
    store, address = learner_setup.open_store()
    results = PROCESSES.Queue()
    ranks = [
        PROCESSES.Process(
            target=_rank, args=(rank, address, config, model, scenario, args, results, head, latent)
        )
        for rank in range(config.num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        outcome = _first_result(results, ranks)
        if isinstance(outcome, Exception):
            raise outcome
        for process in ranks:
            process.join(timeout=60)
        return outcome
    finally:
        for process in ranks:
            process.kill()
            process.join()
        del store  # open until here


def _first_result(results: Any, ranks: list[Any]) -> Any:
    deadline = time.monotonic() + PROCESS_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            return results.get(timeout=0.2)
        except queue.Empty:
            if all(process.exitcode is not None for process in ranks):
                return None
    raise TimeoutError(f"the learner's ranks did not end within {PROCESS_TIMEOUT_S} s")


def _rank(
    rank: int,
    store_address: tuple[str, int],
    config: LearnerConfig,
    model: Path,
    scenario: Any,
    args: Any,
    results: Any,
    head: Head,
    latent: LatentTasks | None,
) -> None:
    try:
        learner = Learner(
            config,
            model,
            rank=rank,
            world_size=config.num_ranks,
            store_address=store_address,
            seed=7,
            head=head,
            latent=latent,
        )
        outcome = scenario(learner, *args)
        if rank == 0:
            results.put(outcome)
        learner.shutdown()
    except UserError as error:
        results.put(error)
    except Exception:
        results.put(RuntimeError(traceback.format_exc()))


os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A server that has imported everything forks the ranks: they start in a moment, without this process's threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "actors.learner",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it for every optimiser, and torch.compile
        "peft",
        "pipeline.core.attention",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


def weights_of(learner: Learner) -> Weights:
    buckets = list(learner.named_weights(bucket_bytes=5000))
    assert len(buckets) > 1
    return {name: tensor.float().clone().numpy() for name, tensor in itertools.chain.from_iterable(buckets)}


def train(
    learner: Learner, examples: list[Example] | list[Path], loss: Loss | None = None, phase_seed: int = 1
) -> Result:
    """One phase; by default of the weighted NLL."""
    return learner.train(examples, loss or nll_of(learner), phase_seed=phase_seed), weights_of(learner)


def train_only(learner: Learner, examples: list[Example], loss: Loss | None = None) -> TrainReport:
    return learner.train(examples, loss or nll_of(learner), phase_seed=1)


def nll_of(learner: Learner) -> WeightedNll:
    return WeightedNll(learner.config.negligible_weight)


def assert_same_weights(found: Weights, expected: Weights, atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


def train_and_export(
    learner: Learner, examples: list[Example], loss: Any, path: Path
) -> list[dict[str, float]]:
    report = learner.train(examples, loss, phase_seed=1)
    learner.export(path)
    return list(report.history)


def values_and_gradients(
    learner: Learner, examples: list[Example], losses: Mapping[str, Loss | Joint]
) -> dict[str, tuple[float, Weights]]:
    """Of one optimiser step over all examples; its learning rate is too small to move a weight."""
    from deepspeed.utils import safe_get_full_grad

    found, step = {}, learner.engine.step
    gradients: Weights = {}

    def capture() -> None:
        for name, parameter in learner.model.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).float().numpy().copy()
        step()

    learner.engine.step = capture
    for name, loss in losses.items():
        report = learner.train(examples, loss, phase_seed=0, learning_rate=1e-30, epochs=1)
        assert report.steps == 1
        found[name] = (report.history[0]["loss"], dict(gradients))
    return found
