"""How a vLLM engine is built: its options, in vLLM's words, and what its processes read from the environment.

CPU and GPU share the engine's code. What differs is here.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors import engine_memory
from actors.engine_use import UseCounter
from actors.weight_transfer import Transport, backend_name
from pipeline.core.packages import has_gpu_packages
from pipeline.core.plan.memory import Device, number_format
from retriever_service.machine import available_cores, share_of_cores

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

_GIB = 2**30
MOST_AGENTS: dict[Device, int] = {"gpu": 512, "cpu": 256}
"""In flight per engine where `rollout.concurrency` leaves it open."""
GPU_BATCHED_TOKENS = 8_192
CPU_BATCHED_TOKENS = 4_096
"""Tokens that an engine computes in one step, prompts and continuations together; see `batched_tokens`."""
CPU_CACHE_BLOCK = 32
"""Tokens of a block of cached keys and values on CPUs, the fewest that vLLM's kernel takes. Only whole blocks are found
again: of vLLM's own 128 an agent's next turn would compute half a block too much, and so would each scored answer."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built."""

    model: str
    """Model directory or hub name; also holds the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format. `auto`: bfloat16 on GPUs, float32 on CPUs (reproducible)."""
    tensor_parallel_size: int = 1
    """Workers (GPUs) that share one copy of the model."""
    max_model_len: int = 4096
    """Longest context in tokens, prompt and completion together."""
    max_num_seqs: int = 256
    """Sequences generated at once; more wait in the engine's queue."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that the engine takes. Not used on CPUs."""
    kv_cache_gib: float = 1.0
    """Memory for cached keys and values on CPUs, in GiB. Not used on GPUs."""
    seed: int = 0
    """Seed of requests that bring none; ours always do."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: quick start, slower generation."""
    num_threads: int | None = None
    """Threads on CPUs, not bound to cores, so that other processes may share them. Null: see `engines_per_node`."""
    engines_per_node: int | None = None
    """On CPUs so many engines divide the cores of their node. Null: an engine has a thread for each."""
    weight_transport: Transport = "shared_memory"
    """How pushed weights arrive (actors.weight_transfer)."""
    start_timeout_s: float = 900.0
    """Longest start, in seconds: loading, compiling, measuring memory."""
    record_proposal: bool = False
    """Completions carry log-probabilities of the distribution that was sampled from, after temperature and truncation,
    instead of the model's own."""
    sleeps: bool = False
    """The engine can `sleep`: on a GPU it then holds its memory in a form that it can give back."""
    request_timeout_s: float = 600.0
    """Longest that one request may take, waiting in the engine's queue included, in seconds."""


def create_llm(options: EngineOptions, counter: UseCounter) -> AsyncLLM:
    """A running engine that is counted; `set_environment` comes first."""
    from actors.vllm_process import async_llm

    llm = async_llm().from_engine_args(
        _engine_args(options), stat_loggers=[lambda vllm_config, engine_index: counter]
    )
    engine_memory.remove_names()
    return llm


def node_cache(name: str) -> Path:
    """A folder of this user that is local to the node, and stays."""
    return Path(tempfile.gettempdir()) / f"exsearch-{os.getuid()}" / name


async def release_memory(llm: AsyncLLM) -> bool:
    """Drops weights and cached keys and values when no request runs any more.

    Returns:
        whether the memory must be asked for (`wake_up`) before new weights arrive.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        await llm.sleep(level=2, mode="wait")
        return True
    # vLLM has no such thing on CPUs.
    await llm.pause_generation(mode="wait", clear_cache=True)
    await llm.collective_rpc("release_memory")
    return False


def set_environment(options: EngineOptions) -> None:
    """What vLLM reads from the environment only; its processes inherit it."""
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(options.start_timeout_s))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Homes may be on a network's file system, where many engines compile at the same time into the same files.
    os.environ.setdefault("VLLM_CACHE_ROOT", str(node_cache("vllm")))
    os.environ.setdefault("TRITON_CACHE_DIR", str(node_cache("triton")))
    if has_gpu_packages():
        # A fork of a process that has so much as counted its GPUs cannot use them.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    threads = options.num_threads
    if threads is None and options.engines_per_node is not None:
        threads = share_of_cores(available_cores(), options.engines_per_node)
    if threads is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if options.weight_transport == "ipc":
        # CUDA memory handles can only be pickled; they come from our own learner.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def batched_tokens(max_model_len: int, max_num_seqs: int, *, on_cpu: bool) -> int:
    """Most tokens of one step. On CPUs the longest prompt must fit; on GPUs a prompt may take several steps."""
    if on_cpu:
        return max(max_model_len, max_num_seqs, CPU_BATCHED_TOKENS)
    # Most of an agent's tokens are prompt; vLLM's default here is 2,048.
    return max(GPU_BATCHED_TOKENS, max_num_seqs)


def agents_that_fit(cache_tokens: int, max_model_len: int) -> int:
    """As many as a cache holds that are half as long as they may become: their mean, at worst."""
    return max(1, 2 * cache_tokens // max_model_len)


def in_flight(concurrency: int | None, fit: int, most: int) -> int:
    """Agents of an engine: as configured, or as many as fit into its cache, `most` at most."""
    return concurrency if concurrency is not None else min(fit, most)


def _executor(options: EngineOptions, *, on_cpu: bool) -> Any:
    """What runs the model's workers, for `AsyncEngineArgs`."""
    if options.tensor_parallel_size > 1:
        # Inside a placement group vLLM would take Ray, which refuses a bundle of several GPUs. All are in reach here.
        return "mp"
    if on_cpu:
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        # The model in the engine's own process. As a class: its name "uni" vLLM turns into "mp" on CPUs, whose engine
        # process spins, on a core that is needed, until its worker process answers. What "mp" is taken for there, the
        # number of threads, `set_environment` says.
        return UniProcExecutor
    return None


def _engine_args(options: EngineOptions) -> AsyncEngineArgs:
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    device: dict[str, Any] = {
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_sleep_mode": options.sleeps,
        "max_num_batched_tokens": batched_tokens(options.max_model_len, options.max_num_seqs, on_cpu=False),
    }
    if on_cpu:
        device = {
            "kv_cache_memory_bytes": int(options.kv_cache_gib * _GIB),
            "block_size": CPU_CACHE_BLOCK,
            # vLLM's CPU generator cannot continue a seeded request whose prompt was prefilled in several chunks.
            "enable_chunked_prefill": False,
            # There is nothing that could run beside the computing. To plan a step before the tokens of the last one are
            # known only computes one token more for every request that has just ended.
            "async_scheduling": False,
            "scheduler_cls": "actors.engine_scheduler.HoldingScheduler",
            "max_num_batched_tokens": batched_tokens(
                options.max_model_len, options.max_num_seqs, on_cpu=True
            ),
        }
    return AsyncEngineArgs(
        model=options.model,
        dtype=number_format(options.dtype, "cpu" if on_cpu else "gpu"),
        tensor_parallel_size=options.tensor_parallel_size,
        distributed_executor_backend=_executor(options, on_cpu=on_cpu),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        seed=options.seed,
        enforce_eager=options.enforce_eager,
        enable_prefix_caching=True,
        use_tqdm_on_load=False,
        logprobs_mode="processed_logprobs" if options.record_proposal else "raw_logprobs",
        disable_log_stats=True,
        weight_transfer_config={"backend": backend_name(options.weight_transport)},
        worker_extension_cls="actors.weight_receiver.WeightReceipts",
        **device,
    )
