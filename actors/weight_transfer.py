"""Learner -> engines: how one version of the weights travels, and how both sides know that it arrived whole.

A push is one pass over the learner's weights, in buckets of (Hugging Face name, tensor):

    learner rank 0                          every engine (each of its workers)
    --------------                          ----------------------------------
    start_weight_update(version)     --->   stops serving, lets running requests end
    per bucket: update_weights       --->   checksums what arrived, then loads it
    finish_weight_update(version, digest) ->  compares digests, drops cached KV, serves `version`

Guarantees:

- The digest covers name, dtype, shape and bytes of every tensor. The learner computes it over what it sends, each
  worker over what it received. A worker that differs, or that was left with parameters nobody sent, fails the push.
- Between the start of a push and its successful end an engine serves nothing; after a failure it serves nothing until
  another push succeeds. A half-pushed version is never sampled from.
- A push ends by its deadline, with success or with `WeightTransferError` (over NCCL: see `VllmSender`).
- Through shared memory an engine that dies or stalls misses the push, and the others get it. The report names those
  that missed it; whoever asked for the push ends them.
- All learner ranks take part in the pass even when the push fails half-way, so that no rank is left waiting in a
  gather.

Transports: "shared_memory" writes each bucket to anonymous shared memory that every process of the node can map (other
nodes get the bytes through Ray's object store first); "nccl" broadcasts between GPUs; "ipc" hands over CUDA memory
handles where learner and engine share a GPU. The last two are vLLM's own engines
(vllm.distributed.weight_transfer), with the same checksums around them.

This module is light: it imports vLLM only when a GPU transport is chosen. The receiving half is `weight_receiver`.
"""

from __future__ import annotations

import base64
import itertools
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import ray
import torch

from actors.weight_bucket import Bucket as Bucket
from actors.weight_bucket import Digest, Segment, write_bucket

Transport = Literal["shared_memory", "nccl", "ipc"]


_BUFFER_BYTES = 256 << 20
"""Of each buffer in which vLLM packs tensors; its default of 1 GiB is much on a GPU that two share."""


class WeightTransferError(RuntimeError):
    """A push failed. The engines concerned serve nothing until the next push succeeds."""


# ---------------------------------------------------------------- the engines, seen from the learner


class Engines(Protocol):
    """All engines that are to receive a push, called as one. Every call is bounded by `timeout_s`, in seconds."""

    missed: dict[int, str]
    """Engines that failed a call and why, by their position. They are not called again."""

    @property
    def world_sizes(self) -> Sequence[int]:
        """Number of workers of each engine."""

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """`method(*args)` on every engine at once; the results of those that did not miss it. Raises
        WeightTransferError."""

    def call_each(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Any]:
        """`method(args[i])` on engine i."""

    def send_segment(self, manifest: dict[str, Any], segment: Segment, timeout_s: float) -> None:
        """`update_weights` on every engine, with the bucket's bytes in a segment of that engine's node."""


@dataclass(frozen=True, slots=True)
class EngineRef:
    """One rollout actor: its Ray handle, its node and the number of workers of its engine."""

    handle: Any
    node_id: str
    world_size: int = 1


class RayEngines:
    """`Engines` as Ray actors that pass the calls on to their `VllmEngine`.

    Args:
        engines: whom to push to.
        node_id: the node of the caller; engines elsewhere get bucket bytes through the object store.
        may_miss: whether the others go on without an engine that fails. Not where they receive as one group.
    """

    def __init__(self, engines: Sequence[EngineRef], node_id: str, *, may_miss: bool) -> None:
        self.engines = list(engines)
        self.node_id = node_id
        self.may_miss = may_miss
        self.missed: dict[int, str] = {}

    @property
    def world_sizes(self) -> Sequence[int]:
        return [engine.world_size for engine in self.engines]

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        return self._on_all(method, lambda number, call: call.remote(*args), timeout_s)

    def call_each(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Any]:
        return self._on_all(method, lambda number, call: call.remote(args[number]), timeout_s)

    def send_segment(self, manifest: dict[str, Any], segment: Segment, timeout_s: float) -> None:
        import ray

        elsewhere = {number for number, e in enumerate(self.engines) if e.node_id != self.node_id}
        payload = None
        if elsewhere - self.missed.keys():
            payload = ray.put(segment.room(manifest["nbytes"]).numpy())

        def send(number: int, update_weights: Any) -> Any:
            if number in elsewhere:
                return update_weights.remote(manifest, payload)
            return update_weights.remote({**manifest, "path": segment.path})

        self._on_all("update_weights", send, timeout_s)

    def _on_all(self, method: str, call: Callable[[int, Any], Any], timeout_s: float) -> list[Any]:
        numbers = [number for number in range(len(self.engines)) if number not in self.missed]
        references = [call(number, getattr(self.engines[number].handle, method)) for number in numbers]
        if not self.may_miss:
            return _answers(method, references, timeout_s)
        pending = _stragglers(references, timeout_s)
        answers = []
        for number, reference in zip(numbers, references, strict=True):
            if reference in pending:
                self.missed[number] = f"{method} took too long: {timeout_s:.1f} s were left of the deadline"
                continue
            try:
                answers += _answers(method, [reference], timeout_s)
            except WeightTransferError as error:
                self.missed[number] = str(error)
        if not answers:
            raise WeightTransferError("; ".join(self.missed.values()))
        return answers


def _answers(method: str, references: list[Any], timeout_s: float) -> list[Any]:
    import ray

    try:
        return list(ray.get(references, timeout=timeout_s))
    except ray.exceptions.GetTimeoutError as error:
        raise WeightTransferError(
            f"{method} on {len(references)} engines did not end within {timeout_s:.1f} s, the rest of the deadline"
        ) from error
    except ray.exceptions.RayError as error:
        raise WeightTransferError(f"{method} failed on an engine: {error}") from error


def _stragglers(references: list[Any], timeout_s: float) -> list[Any]:
    """Calls that did not end in time: in half of it where others did, because these need the rest."""
    import ray

    done, pending = ray.wait(references, num_returns=len(references), timeout=timeout_s / 2)
    if not done:
        _, pending = ray.wait(references, num_returns=len(references), timeout=timeout_s / 2)
    return list(pending)


# ---------------------------------------------------------------- senders


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push moved. `digest` is that of the tensors as sent, confirmed by every engine but those that missed it:
    `missed` says why, by their position among the receivers."""

    version: int
    digest: str
    nbytes: int
    tensors: int
    seconds: float
    missed: Mapping[int, str] = field(default_factory=dict)


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise WeightTransferError(f"the push did not end within its deadline of {self._seconds} s")
        return left


class _Pass:
    """One pass over the learner's weights that digests what goes by and can be completed after a failure."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self._buckets = iter(buckets)
        self.sent = Digest()
        self.nbytes = 0

    def buckets(self) -> Iterator[Bucket]:
        for bucket in self._buckets:
            self.nbytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
            yield bucket

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self.buckets():
            for name, tensor in bucket:
                self.sent.add(name, tensor)
                if tensor.is_cuda:
                    # vLLM packs on side streams; the memory must not be used again before they have read it.
                    tensor.record_stream(torch.cuda.current_stream())
                yield name, tensor

    def drain(self) -> None:
        """Runs the rest of the pass: it may be a collective in which other ranks wait for this one."""
        for _ in self._buckets:
            pass


class WeightSender(Protocol):
    """The learner's end of a transport. All ranks call `push`; rank 0 sends."""

    def push(self, version: int) -> PushReport | None:
        """Sends one version to every engine. Returns the report on rank 0, None elsewhere.

        Raises:
            WeightTransferError: an engine did not confirm the version in time.
        """


class SharedMemorySender:
    """Sends through shared memory; CPU and GPU learners alike.

    Args:
        engines: rank 0's view of the engines; None on the other ranks.
        weights: starts a pass over the learner's weights; every rank must make it.
        deadline_s: the longest a push may take, in seconds.
    """

    def __init__(
        self, engines: Engines | None, weights: Callable[[], Iterable[Bucket]], *, deadline_s: float
    ) -> None:
        self.engines = engines
        self.weights = weights
        self.deadline_s = deadline_s
        self._segment = Segment()

    def push(self, version: int) -> PushReport | None:
        weights = _Pass(self.weights())
        try:
            return None if self.engines is None else self._send(self.engines, weights, version)
        finally:
            weights.drain()

    def _send(self, engines: Engines, weights: _Pass, version: int) -> PushReport:
        started, deadline = time.monotonic(), _Deadline(self.deadline_s)
        engines.call("start_weight_update", version, deadline.left(), timeout_s=deadline.left())
        for bucket in weights.buckets():
            manifest = write_bucket(bucket, self._segment, weights.sent)
            engines.send_segment(asdict(manifest), self._segment, deadline.left())
        digest = weights.sent.hexdigest()
        engines.call("finish_weight_update", version, digest, timeout_s=deadline.left())
        seconds = time.monotonic() - started
        return PushReport(version, digest, weights.nbytes, len(weights.sent), seconds, dict(engines.missed))


class VllmSender:
    """Sends with vLLM's own trainer-side engines, between GPUs. For one push: the engines may be others next time.

    A broadcast in which an engine died cannot be broken off from within: whoever calls `push` bounds it too, and ends
    the learner rank and the engines of a failed push.

    Args:
        transport: "nccl" where learner and engines have their own GPUs, "ipc" where they share one.
        engines: as in `SharedMemorySender`.
        weights: as in `SharedMemorySender`.
        rank: this learner rank; 0 sends.
        deadline_s: the longest a push may take, in seconds.
        largest_tensor_bytes: size of the largest tensor that will be sent.
    """

    def __init__(
        self,
        transport: Literal["nccl", "ipc"],
        engines: Engines | None,
        weights: Callable[[], Iterable[Bucket]],
        *,
        rank: int,
        deadline_s: float,
        largest_tensor_bytes: int,
    ) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.deadline_s = deadline_s
        self.client = _EngineClient(engines, deadline_s)
        self.source = _learner_source(weights)
        num_workers = sum(engines.world_sizes) if engines is not None else 0
        self.trainer = WeightTransferTrainerFactory.trainer_init(
            trainer_init_info(transport, rank, 1 + num_workers, largest_tensor_bytes),
            client=self.client,
            source=self.source,
        )

    def push(self, version: int) -> PushReport | None:
        started = time.monotonic()
        self.client.begin(version, self.source, self.deadline_s)
        try:
            self.trainer.send_weights()
        finally:
            self.source.current.drain()
        self.trainer.shutdown()
        if self.client.engines is None:
            return None
        sent = self.source.current
        return PushReport(
            version, sent.sent.hexdigest(), sent.nbytes, len(sent.sent), time.monotonic() - started
        )


def trainer_init_info(
    transport: Literal["nccl", "ipc"], rank: int, world_size: int, largest_tensor_bytes: int
) -> Any:
    """vLLM's init info of one learner rank; `world_size` counts the sender and every engine worker.

    For nccl it names a free port of this node, which rank 0 listens on next.
    """
    if transport == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=port,
            world_size=world_size,
            rank=rank,
            packed_buffer_size_bytes=_BUFFER_BYTES,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    # Unlike NCCL's, this buffer must hold the largest tensor whole.
    return IPCTrainerInitInfo(
        packed=True, rank=rank, packed_buffer_size_bytes=max(_BUFFER_BYTES, largest_tensor_bytes)
    )


class _EngineClient:
    """vLLM's `VLLMWeightSyncClient` over `Engines`: adds version, digest and deadline to the four plain calls."""

    def __init__(self, engines: Engines | None, deadline_s: float) -> None:
        self.engines = engines
        self._deadline = _Deadline(deadline_s)
        self._version = -1
        self._source: Any = None

    def begin(self, version: int, source: Any, deadline_s: float) -> None:
        self._version, self._source, self._deadline = version, source, _Deadline(deadline_s)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine's workers take their own ranks in the transfer group, after those of the engines before it."""
        assert self.engines is not None
        infos = [dict(init_info) for _ in self.engines.world_sizes]
        if "rank_offset" in init_info:
            starts = itertools.accumulate(self.engines.world_sizes, initial=init_info["rank_offset"])
            for info, start in zip(infos, starts, strict=False):
                info["rank_offset"] = start
        self.engines.call_each("init_weight_transfer_engine", infos, self._deadline.left())

    def start_weight_update(self) -> None:
        assert self.engines is not None
        left = self._deadline.left()
        self.engines.call("start_weight_update", self._version, left, timeout_s=left)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        assert self.engines is not None
        info = {key: value for key, value in update_info.items() if value is not None}
        if "ipc_handles" in info:
            # CUDA handles are no plain data; this is the form that the engine accepts over any wire.
            handles = pickle.dumps(info.pop("ipc_handles"))
            info["ipc_handles_pickled"] = base64.b64encode(handles).decode("ascii")
        self.engines.call("update_weights", info, timeout_s=self._deadline.left())

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert self.engines is not None
        digest = self._source.current.sent.hexdigest()
        self.engines.call("finish_weight_update", self._version, digest, timeout_s=self._deadline.left())


def _learner_source(weights: Callable[[], Iterable[Bucket]]) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class LearnerSource(WeightSource):
        """The learner's weights as vLLM wants them. Names and shapes are learnt in one extra pass, once."""

        def __init__(self) -> None:
            self.current = _Pass(())
            self._metadata: list[ParamMeta] = []

        def metadata(self) -> list[ParamMeta]:
            if not self._metadata:
                self._metadata = [
                    ParamMeta(name, tensor.dtype, tuple(tensor.shape))
                    for b in weights()
                    for name, tensor in b
                ]
            return self._metadata

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            self.current = _Pass(weights())
            return self.current.tensors()

    return LearnerSource()


# ---------------------------------------------------------------- registration


def backend_name(transport: Transport) -> str:
    """The name under which vLLM knows our receiving engine of a transport."""
    return f"exsearch_{transport}"


def register() -> None:
    """Makes the receiving engines known to vLLM in this process; may be called again.

    An entry point of the group `vllm.general_plugins`, which every vLLM process runs.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    receivers: dict[Transport, str] = {
        "shared_memory": "SharedMemoryReceiver",
        "nccl": "NcclReceiver",
        "ipc": "IpcReceiver",
    }
    for transport, class_name in receivers.items():
        if backend_name(transport) not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(
                backend_name(transport), "actors.weight_receiver", class_name
            )
