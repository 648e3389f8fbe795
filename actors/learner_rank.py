"""A learner rank as a Ray actor: it also says where it is, and pushes its weights."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors import learner_setup
from actors.learner import Learner
from actors.weight_transfer import (
    EngineRef,
    PushReport,
    RayEngines,
    SharedMemorySender,
    Transport,
    VllmSender,
    WeightSender,
)


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
