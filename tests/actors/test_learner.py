"""The learner on real DeepSpeed ranks (gloo, CPU, float32): one mathematics, however the work is cut up.

Each scenario runs in fresh processes, one per rank, without Ray. The reference is a bare torch loop over single
examples that follows the formula of the loss literally.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from actors.learner import Learner, LearnerRank
from pipeline.core.config import LearnerConfig, LoraConfig
from pipeline.core.errors import UserError
from pipeline.core.packing import plan_epoch
from pipeline.core.records import Example, examples_to_table
from pipeline.core.schedule import learning_rate_at

pytestmark = pytest.mark.component

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
Weights = dict[str, np.ndarray]
Result = tuple[dict[str, Any], Weights]


def make_examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Random examples; every fourth has weight 0, the others differ."""
    random = np.random.default_rng(seed)
    examples = []
    for k in range(count):
        length = int(random.integers(5, LONGEST + 1))
        mask = random.random(length) < 0.5
        mask[-1] = True
        token_ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        examples.append(Example(f"q{k}", 0, token_ids, mask, [0.0, 0.3, 1.0, 2.0][k % 4]))
    return examples


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "training_log.txt").write_text("not part of a model")
    return path


# ------------------------------------------------------------------ ranks


def run_ranks(config: LearnerConfig, model: Path, scenario: Callable[..., Any], *args: Any) -> Any:
    """Run `scenario(learner, *args)` on `config.num_ranks` ranks; the result of rank 0. Raises what a rank raised."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = PROCESSES.Queue()
    ranks = [
        PROCESSES.Process(target=_rank, args=(rank, port, config, model, scenario, args, results))
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
    rank: int, port: int, config: LearnerConfig, model: Path, scenario: Any, args: Any, results: Any
) -> None:
    try:
        learner = Learner(
            config,
            model,
            rank=rank,
            world_size=config.num_ranks,
            master_addr="127.0.0.1",
            master_port=port,
            seed=7,
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
    return {name: tensor.numpy() for name, tensor in itertools.chain.from_iterable(buckets)}


def train(learner: Learner, examples: list[Example] | list[Path], phase_seed: int = 1) -> Result:
    return learner.train(examples, phase_seed=phase_seed), weights_of(learner)


def assert_same_weights(found: Weights, expected: Weights, atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


# ------------------------------------------------------------------ the mathematics


def reference(model: Path, examples: list[Example], config: LearnerConfig) -> tuple[list[float], Weights]:
    """Loss of each step and final weights, by the formula of the loss, one example at a time, without DeepSpeed."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.0, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    n = [int(e.loss_mask[1:].sum()) for e in examples]
    scale = sum(n) / sum(e.weight * n_k for e, n_k in zip(examples, n, strict=True))
    lengths = [len(e.token_ids) for e in examples]
    steps = [
        step.examples
        for epoch in range(config.epochs)
        for step in plan_epoch(
            lengths, batch_size=config.batch_size, world_size=1, token_budget=LONGEST, seed=(1, epoch)
        )
    ]
    losses = []
    for index, batch in enumerate(steps):
        loss = torch.zeros(())
        for k in batch:
            ids = torch.from_numpy(examples[k].token_ids.astype(np.int64))
            logprobs = network(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            mask = torch.from_numpy(examples[k].loss_mask[1:])
            loss = loss - examples[k].weight * scale * logprobs[mask].sum()
        loss = loss / sum(n[k] for k in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate_at(
            index, len(steps), peak=config.learning_rate, warmup_ratio=config.warmup_ratio, min_ratio=0.0
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy() for name, p in network.named_parameters()}


@pytest.fixture(scope="module")
def expected(model_path: Path) -> tuple[list[float], Weights]:
    return reference(model_path, make_examples(), CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_microbatch": LONGEST},
        {"num_ranks": 2, "tokens_per_microbatch": LONGEST},
        {"num_ranks": 2, "zero_stage": 1, "tokens_per_microbatch": 1000},
        {"num_ranks": 2, "zero_stage": 2},
        {"num_ranks": 2, "zero_stage": 2, "offload_optimizer": True},
        {"num_ranks": 2, "zero_stage": 3},
        {"num_ranks": 2, "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"num_ranks": 2, "zero_stage": 3, "gradient_checkpointing": True, "tokens_per_microbatch": 1000},
        {"num_ranks": 3, "zero_stage": 1, "attention": "eager"},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_ranks_zero_stage_and_packing_do_not_change_losses_or_weights(
    model_path: Path, expected: tuple[list[float], Weights], changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=changes)
    metrics, weights = run_ranks(config, model_path, train, make_examples())
    assert [step["loss"] for step in metrics["history"]] == pytest.approx(expected[0], abs=1e-5)
    assert_same_weights(weights, expected[1])


def test_bfloat16_comes_close_to_float32_at_any_stage(
    model_path: Path, expected: tuple[list[float], Weights]
) -> None:
    for stage in (0, 2):
        config = CONFIG.model_copy(update={"dtype": "bfloat16", "zero_stage": stage, "num_ranks": stage or 1})
        metrics = run_ranks(config, model_path, train_only, make_examples())
        assert [step["loss"] for step in metrics["history"]] == pytest.approx(expected[0], rel=0.02)


def train_only(learner: Learner, examples: list[Example]) -> dict[str, Any]:
    return learner.train(examples, phase_seed=1)


def test_what_zero_weight_examples_say_does_not_matter(model_path: Path) -> None:
    examples = make_examples()
    nonsense = [
        e if e.weight else Example(e.question_id, 0, e.token_ids[::-1].copy(), e.loss_mask, 0.0)
        for e in examples
    ]
    first, second = (run_ranks(CONFIG, model_path, train, batch) for batch in (examples, nonsense))
    assert_same_weights(second[1], first[1], atol=0)
    assert first[0]["skipped_examples"] == 3


def test_nothing_with_weight_leaves_the_model_as_it_is(model_path: Path) -> None:
    failures = [e for e in make_examples() if e.weight == 0]
    metrics, weights = run_ranks(CONFIG, model_path, train, failures)
    assert metrics["steps"] == 0
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    assert_same_weights(weights, {n: p.detach().numpy() for n, p in original.named_parameters()}, atol=0)


def test_metrics_say_what_was_trained(model_path: Path) -> None:
    examples = make_examples()
    metrics = run_ranks(CONFIG, model_path, train_only, examples)
    computed = [e for e in examples if e.weight]
    assert metrics["trained_tokens"] == 2 * sum(int(e.loss_mask[1:].sum()) for e in computed)
    assert metrics["total_tokens"] == 2 * sum(len(e.token_ids) for e in computed)
    assert metrics["steps"] == len(metrics["history"]) == 6
    assert metrics["loss"] < metrics["history"][0]["loss"]
    assert 0 < metrics["pack_fill"] <= 1
    assert metrics["rank_balance"] == 1.0


def test_examples_of_negligible_weight_count_but_are_not_computed(model_path: Path) -> None:
    config = CONFIG.model_copy(update={"negligible_weight": 0.5})  # the examples of weight 0.3 are below it
    found, full = (run_ranks(c, model_path, train_only, make_examples()) for c in (config, CONFIG))
    assert (found["skipped_examples"], full["skipped_examples"]) == (6, 3)
    assert [step["tokens"] for step in found["history"]] == [step["tokens"] for step in full["history"]]
    computed = [e for e in make_examples() if e.weight >= 1]
    assert found["total_tokens"] == 2 * sum(len(e.token_ids) for e in computed)


def test_an_example_that_does_not_fit_is_an_error_that_names_it(model_path: Path) -> None:
    config = CONFIG.model_copy(update={"tokens_per_microbatch": 16})
    with pytest.raises(
        UserError, match=r"q\d+/0 has \d+ tokens, more than learner\.tokens_per_microbatch: 16"
    ):
        run_ranks(config, model_path, train_only, make_examples())


# ------------------------------------------------------------------ checkpoints


def train_until_killed(learner: Learner, examples: list[Example], path: Path) -> None:
    """Two M-steps; saves after step 4 of the second and dies in its step 5."""
    learner.train(examples, phase_seed=0)

    def die(_: dict[str, float]) -> None:
        if learner.progress()["step"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(examples, phase_seed=1, checkpoint_path=path, checkpoint_every=2, on_step=die)


def go_on(learner: Learner, examples: list[Example], path: Path) -> Result:
    learner.load(path)
    return train(learner, examples)


def two_phases(learner: Learner, examples: list[Example]) -> Result:
    learner.train(examples, phase_seed=0)
    return train(learner, examples)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_ranks": 2, "zero_stage": 1},
        {"num_ranks": 2, "zero_stage": 3},
        {"num_ranks": 2, "zero_stage": 2, "lora": LoraConfig(rank=2, dropout=0.3)},
    ],
    ids=["stage 0", "stage 1", "stage 3", "stage 2, dropout"],
)
def test_a_killed_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, examples = CONFIG.model_copy(update=changes), make_examples()
    assert run_ranks(config, model_path, train_until_killed, examples, tmp_path) is None
    resumed = run_ranks(config, model_path, go_on, examples, tmp_path)
    undisturbed = run_ranks(config, model_path, two_phases, examples)
    assert resumed[0]["history"] == undisturbed[0]["history"]
    assert resumed[0]["total_tokens"] < undisturbed[0]["total_tokens"]
    assert_same_weights(resumed[1], undisturbed[1], atol=0)


def train_and_save(learner: Learner, examples: list[Example], path: Path) -> Result:
    result = train(learner, examples)
    learner.save(path)
    return result


def test_a_checkpoint_from_the_end_of_a_phase_is_not_trained_on_again(
    model_path: Path, tmp_path: Path
) -> None:
    examples = make_examples()
    done = run_ranks(CONFIG, model_path, train_and_save, examples, tmp_path)
    again = run_ranks(CONFIG, model_path, go_on, examples, tmp_path)
    assert again[0]["history"] == done[0]["history"]
    assert again[0]["total_tokens"] == 0
    assert_same_weights(again[1], done[1], atol=0)


def test_a_checkpoint_of_another_layout_is_refused_with_the_keys_to_set(
    model_path: Path, tmp_path: Path
) -> None:
    run_ranks(CONFIG, model_path, train_and_save, make_examples(), tmp_path)
    other = CONFIG.model_copy(update={"zero_stage": 1})
    with pytest.raises(UserError, match=r"learner\.zero_stage: 0 \(now 1\)"):
        run_ranks(other, model_path, go_on, make_examples(), tmp_path)
    with pytest.raises(UserError, match="no complete learner checkpoint"):
        run_ranks(CONFIG, model_path, go_on, make_examples(), tmp_path / "elsewhere")


# ------------------------------------------------------------------ weights, out


def train_and_export(learner: Learner, examples: list[Example], path: Path) -> Weights:
    learner.train(examples, phase_seed=1)
    learner.export(path)
    learner.export(path)  # over an earlier one
    return weights_of(learner)


@pytest.mark.parametrize("changes", [{}, {"num_ranks": 2, "zero_stage": 3}], ids=["stage 0", "stage 3"])
def test_an_exported_model_opens_in_transformers_with_the_trained_weights(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "model"
    weights = run_ranks(
        CONFIG.model_copy(update=changes), model_path, train_and_export, make_examples(), path
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_weights({n: p.detach().numpy() for n, p in opened.named_parameters()}, weights, atol=0)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    assert opened.config.to_diff_dict() == original.config.to_diff_dict()
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in path.iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def lora_state(learner: Learner, examples: list[Example], path: Path) -> tuple[Weights, Weights]:
    """Frozen weights after training, and the logits of the live model (adapters beside the weights)."""
    learner.train(examples, phase_seed=1)
    learner.export(path)
    trained = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    ids = torch.arange(20)[None]
    learner.model.eval()
    kwargs = {"segment_lengths": (20,), "use_cache": False}
    with torch.no_grad():
        logits = learner.engine(input_ids=ids, position_ids=ids.new_tensor(range(20))[None], **kwargs).logits
    return weights_of(learner), {"logits": logits.numpy()}


@pytest.mark.parametrize("changes", [{}, {"num_ranks": 2, "zero_stage": 3}], ids=["stage 0", "stage 3"])
def test_lora_trains_adapters_only_and_exports_the_merged_model(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update={"lora": LoraConfig(rank=4, alpha=8.0), **changes})
    path = tmp_path / "model"
    weights, live = run_ranks(config, model_path, lora_state, make_examples(), path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_weights({n: p.detach().numpy() for n, p in opened.named_parameters()}, weights, atol=0)
    np.testing.assert_allclose(
        opened(torch.arange(20)[None]).logits.detach().numpy(), live["logits"], atol=1e-5
    )
    original = dict(transformers.AutoModelForCausalLM.from_pretrained(model_path).named_parameters())
    changed = {n for n, w in weights.items() if not np.array_equal(w, original[n].detach().numpy())}
    assert changed == {n for n in original if n.endswith("proj.weight")}


# ------------------------------------------------------------------ as a Ray actor


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_a_ray_actor_trains_from_shards_and_tells_its_progress(
    model_path: Path, tmp_path: Path, ray_cluster: Any, expected: tuple[list[float], Weights]
) -> None:
    examples = make_examples()
    shards = [tmp_path / f"{part}.parquet" for part in range(2)]
    pq.write_table(examples_to_table(examples[:7]), shards[0])
    pq.write_table(examples_to_table(examples[7:]), shards[1])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rank = LearnerRank.remote(
        CONFIG, model_path, rank=0, world_size=1, master_addr="127.0.0.1", master_port=port
    )
    assert ray_cluster.get(rank.progress.remote(), timeout=PROCESS_TIMEOUT_S)["num_steps"] == 0
    metrics = ray_cluster.get(rank.train.remote(shards, phase_seed=1), timeout=PROCESS_TIMEOUT_S)
    assert [step["loss"] for step in metrics["history"]] == pytest.approx(expected[0], abs=1e-5)
    assert ray_cluster.get(rank.progress.remote(), timeout=60)["step"] == 6
