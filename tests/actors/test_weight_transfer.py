"""Weight transfer: checksums and segments, the senders against fakes, and whole pushes into a real engine."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import weight_transfer
from actors.weight_bucket import Bucket, Digest, Segment, tensor_checksum, write_bucket
from actors.weight_transfer import (
    EngineRef,
    RayEngines,
    SharedMemorySender,
    VllmSender,
    WeightTransferError,
    trainer_init_info,
)
from pipeline.core.agents.program import Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=20, seed=0, stop=())
PROMPT = list(range(260, 290)) * 10

# ---------------------------------------------------------------- checksums and segments

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64])


@given(
    size=st.integers(0, 70_000),
    dtype=dtypes,
    seed=st.integers(0, 99),
    where=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=50, deadline=None)
def test_checksum_notices_any_changed_byte(size: int, dtype: torch.dtype, seed: int, where: float) -> None:
    torch.manual_seed(seed)
    tensor = torch.randint(-100, 100, (size,)).to(dtype)
    changed = tensor.clone()
    if size:
        data = changed.view(torch.uint8)
        data[int(where * data.numel())] ^= 1
        assert tensor_checksum(changed) != tensor_checksum(tensor)
    assert tensor_checksum(tensor.clone()) == tensor_checksum(tensor)


def test_checksum_is_that_of_the_values_not_of_the_layout() -> None:
    tensor = torch.arange(6 * 7, dtype=torch.bfloat16).view(6, 7)
    assert tensor_checksum(tensor.t()) == tensor_checksum(tensor.t().contiguous())
    assert tensor_checksum(tensor[1:]) == tensor_checksum(tensor[1:].clone())


def test_checksum_notices_exchanged_halves() -> None:
    tensor = torch.randn(100_000)
    assert tensor_checksum(tensor) != tensor_checksum(torch.cat([tensor[50_000:], tensor[:50_000]]))


def digest_of(*named: tuple[str, torch.Tensor]) -> str:
    digest = Digest()
    for name, tensor in named:
        digest.add(name, tensor)
    return digest.hexdigest()


def test_digest_covers_names_dtypes_and_shapes_but_not_order() -> None:
    a, b = ("a", torch.ones(4)), ("b", torch.zeros(4))
    assert digest_of(a, b) == digest_of(b, a)
    others = [
        digest_of(a),
        digest_of(("a", b[1]), ("b", a[1])),
        digest_of(a, ("b", torch.zeros(2, 2))),
        digest_of(a, ("b", torch.zeros(4, dtype=torch.int32))),
    ]
    assert digest_of(a, b) not in others and len(set(others)) == 4


def test_bucket_comes_out_of_its_segment_as_it_went_in() -> None:
    bucket = [
        ("scalar", torch.tensor(3.0)),
        ("odd", torch.arange(5, dtype=torch.int8)),
        ("half", torch.randn(3, 7).to(torch.bfloat16)),
        ("empty", torch.empty(0, 4)),
        ("transposed", torch.randn(4, 6).t()),
    ]
    sent, segment = Digest(), Segment()
    manifest = write_bucket(bucket, segment, sent)
    data = torch.from_file(segment.path, shared=False, size=manifest.nbytes, dtype=torch.uint8)
    segment.close()
    received = manifest.tensors(data)
    assert [name for name, _ in received] == [name for name, _ in bucket]
    for (_, got), (_, expected) in zip(received, bucket, strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    assert digest_of(*received) == sent.hexdigest() == manifest.digest


def filled(content: bytes) -> Segment:
    segment = Segment()
    segment.room(len(content)).numpy()[:] = np.frombuffer(content, np.uint8)
    return segment


def test_segment_is_readable_from_another_process() -> None:
    segment = filled(b"weights")
    read = subprocess.run(
        [sys.executable, "-c", f"print(open('{segment.path}').read())"], capture_output=True
    )
    assert read.stdout == b"weights\n"


def test_segment_keeps_its_path_as_it_grows() -> None:
    segment = filled(b"short")
    path = segment.path
    segment.room(1000).fill_(65)
    assert segment.path == path
    assert Path(path).read_bytes() == b"A" * 1000


def test_closed_segment_can_no_longer_be_opened() -> None:
    segment = filled(b"gone")
    segment.close()
    assert not Path(segment.path).exists()


# ---------------------------------------------------------------- senders, against fakes


class RecordingEngines:
    """Two engines, of two workers and one, that confirm everything; `fail_on` names a call that they refuse."""

    def __init__(self, fail_on: str = "") -> None:
        self.world_sizes = [2, 1]
        self.missed: dict[int, str] = {}
        self.calls: list[tuple[str, Any]] = []
        self.fail_on = fail_on

    def _record(self, method: str, args: Any) -> list[Any]:
        self.calls.append((method, args))
        if method == self.fail_on:
            raise WeightTransferError(f"{method} failed")
        return [None, None]

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        assert timeout_s > 0
        return self._record(method, args)

    def call_each(self, method: str, args: Any, timeout_s: float) -> list[Any]:
        return self._record(method, args)

    def send_segment(self, manifest: dict[str, Any], segment: Segment, timeout_s: float) -> None:
        self._record("update_weights", manifest["names"])


def weights() -> Iterator[Bucket]:
    yield [("a", torch.ones(3)), ("b", torch.zeros(2, 2))]
    yield [("c", torch.full((5,), 2.0))]


def test_shared_memory_push_is_start_buckets_finish() -> None:
    engines = RecordingEngines()
    report = SharedMemorySender(engines, weights, deadline_s=10).push(7)
    digest = digest_of(*(pair for bucket in weights() for pair in bucket))
    assert [name for name, _ in engines.calls] == [
        "start_weight_update",
        "update_weights",
        "update_weights",
        "finish_weight_update",
    ]
    assert engines.calls[0][1][0] == 7
    assert [names for _, names in engines.calls[1:3]] == [["a", "b"], ["c"]]
    assert engines.calls[3][1] == (7, digest)
    assert report is not None
    assert (report.version, report.digest, report.nbytes, report.tensors) == (7, digest, 4 * 12, 3)


@pytest.mark.parametrize("fail_on", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_failed_push_still_completes_the_learners_pass(fail_on: str) -> None:
    seen = []

    def watched() -> Iterator[Bucket]:
        for bucket in weights():
            seen.extend(name for name, _ in bucket)
            yield bucket

    with pytest.raises(WeightTransferError, match=fail_on):
        SharedMemorySender(RecordingEngines(fail_on), watched, deadline_s=10).push(1)
    assert seen == ["a", "b", "c"]


def test_other_ranks_only_make_the_pass() -> None:
    passes = []
    sender = SharedMemorySender(None, lambda: (passes.append(b) or b for b in weights()), deadline_s=10)
    assert sender.push(1) is None
    assert len(passes) == 2


def test_push_past_its_deadline_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(weight_transfer.time, "monotonic", lambda: now[0])

    def slow() -> Iterator[Bucket]:
        for bucket in weights():
            now[0] += 6
            yield bucket

    with pytest.raises(WeightTransferError, match="deadline of 10 s"):
        SharedMemorySender(RecordingEngines(), slow, deadline_s=10).push(1)


class FakeRay:
    """Ray with immediate answers: `remote` calls return their outcome, `get` raises the errors among them."""

    class exceptions:
        class RayError(Exception):
            pass

        class GetTimeoutError(RayError):
            pass

    @staticmethod
    def put(value: Any) -> Any:
        return ("in the object store", value.tobytes())

    @staticmethod
    def wait(references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        slow = FakeRay.exceptions.GetTimeoutError
        pending = [reference for reference in references if isinstance(reference, slow)]
        return [reference for reference in references if reference not in pending], pending

    @staticmethod
    def get(references: list[Any], timeout: float) -> list[Any]:
        for reference in references:
            if isinstance(reference, Exception):
                raise reference
        return references


def fake_actor(calls: list[Any], outcome: Any = None) -> Any:
    def remote(*args: Any) -> Any:
        calls.append(args)
        return outcome

    return SimpleNamespace(update_weights=SimpleNamespace(remote=remote))


def test_engines_on_other_nodes_get_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay)
    here: list[Any] = []
    there: list[Any] = []
    engines = RayEngines(
        [EngineRef(fake_actor(here), "n1"), EngineRef(fake_actor(there), "n2", 4)], "n1", may_miss=True
    )
    segment = filled(b"bytes, and older ones behind them")
    manifest = {"names": ["a"], "nbytes": 5}
    engines.send_segment(manifest, segment, timeout_s=5)
    assert here == [({**manifest, "path": segment.path},)]
    assert there == [(manifest, ("in the object store", b"bytes"))]
    assert engines.world_sizes == [1, 4]


SLOW, DIED = FakeRay.exceptions.GetTimeoutError("slow"), FakeRay.exceptions.RayError("died")


@pytest.mark.parametrize("error", [SLOW, DIED])
def test_an_engine_that_fails_misses_the_push_and_is_not_called_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay)
    failing: list[Any] = []
    going_on: list[Any] = []
    receivers = [EngineRef(fake_actor(failing, error), "n1"), EngineRef(fake_actor(going_on, "well"), "n1")]
    engines = RayEngines(receivers, "n1", may_miss=True)
    for _ in range(2):
        assert engines.call("update_weights", {}, timeout_s=1) == ["well"]
    assert (len(failing), len(going_on)) == (1, 2)
    assert list(engines.missed) == [0]


@pytest.mark.parametrize("error", [SLOW, DIED])
@pytest.mark.parametrize(("others", "may_miss"), [([], True), (["well"], False)])
def test_a_push_fails_with_its_last_engine_and_with_the_first_of_a_group(
    monkeypatch: pytest.MonkeyPatch, error: Exception, others: list[str], may_miss: bool
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay)
    receivers = [EngineRef(fake_actor([], outcome), "n1") for outcome in [error, *others]]
    with pytest.raises(WeightTransferError, match="update_weights"):
        RayEngines(receivers, "n1", may_miss=may_miss).call("update_weights", {}, timeout_s=1)


class FakeTrainer:
    """Stands in for vLLM's trainer-side engine: passes over the source and drives the client as the real ones do."""

    def __init__(self, init_info: Any, client: Any, source: Any) -> None:
        self.init_info, self.client, self.source = init_info, client, source
        self.is_shut_down = False

    def shutdown(self) -> None:
        self.is_shut_down = True

    def send_weights(self) -> None:
        self.client.start_weight_update()
        names = [meta.name for meta in self.source.metadata()]
        assert [name for name, _ in self.source] == names
        self.client.update_weights(
            {"names": names, "ipc_handles": {"gpu": (1, torch.float32)}, "tensor_sizes": None}
        )
        self.client.finish_weight_update()


def vllm_sender(monkeypatch: pytest.MonkeyPatch, transport: Any, engines: Any) -> VllmSender:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    def trainer_init(init_info: Any, *, client: Any, source: Any) -> FakeTrainer:
        return FakeTrainer(init_info, client, source)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    return VllmSender(
        transport,
        engines,
        weights,
        rank=0,
        deadline_s=10,
        largest_tensor_bytes=16,
    )


def test_gpu_push_carries_version_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = RecordingEngines()
    sender = vllm_sender(monkeypatch, "nccl", engines)
    report = sender.push(3)
    assert sender.trainer.is_shut_down
    digest = digest_of(*(pair for bucket in weights() for pair in bucket))
    assert [name for name, _ in engines.calls] == [
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ]
    assert engines.calls[0][1][0] == 3
    assert engines.calls[2][1] == (3, digest)
    assert report is not None
    assert (report.version, report.digest, report.nbytes, report.tensors) == (3, digest, 48, 3)


def test_ipc_handles_travel_in_the_form_that_vllm_takes_over_a_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = RecordingEngines()
    vllm_sender(monkeypatch, "ipc", engines).push(1)
    (info,) = engines.calls[1][1]
    assert pickle.loads(b64decode(info.pop("ipc_handles_pickled"))) == {"gpu": (1, torch.float32)}
    assert info == {"names": ["a", "b", "c"]}


def test_each_engine_takes_its_own_ranks_in_the_nccl_group(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = RecordingEngines()
    sender = vllm_sender(monkeypatch, "nccl", engines)
    info = sender.trainer.init_info
    assert (info.master_address, info.world_size, info.rank) == (ray.util.get_node_ip_address(), 4, 0)
    with socket.create_server((info.master_address, info.master_port)):  # it is free
        pass
    sender.client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 4})
    method, infos = engines.calls[0]
    assert method == "init_weight_transfer_engine"
    assert infos == [{"rank_offset": 1, "world_size": 4}, {"rank_offset": 3, "world_size": 4}]


@pytest.mark.parametrize(("largest", "buffer"), [(1 << 20, 256 << 20), (1_089_994_752, 1_089_994_752)])
def test_the_ipc_buffer_holds_the_largest_tensor(largest: int, buffer: int) -> None:
    info = trainer_init_info("ipc", 2, 0, largest)
    assert (info.packed, info.rank, info.is_sender) == (True, 2, False)
    assert info.packed_buffer_size_bytes == buffer


def test_every_transport_is_known_to_vllm_once_registered() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    weight_transfer.register()
    weight_transfer.register()
    names = {"exsearch_shared_memory", "exsearch_nccl", "exsearch_ipc"}
    classes = {WeightTransferEngineFactory._registry[name]().__name__ for name in names}
    assert classes == {"SharedMemoryReceiver", "NcclReceiver", "IpcReceiver"}
