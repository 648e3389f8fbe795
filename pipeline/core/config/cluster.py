"""Where it is learnt, and who is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.core.config.section import Section, as_word

Transport = Literal["auto", "shared_memory", "nccl", "ipc"]


class ClusterConfig(Section):
    address: str | None = None
    """Ray address. Null: RAY_ADDRESS, the cluster of the submitted job or one that runs on this machine if there is
    one, else a local one for this command."""
    devices: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: gpu if the cluster has any and the packages for GPUs are installed."""
    colocate: Annotated[Literal["auto", "yes", "no"], BeforeValidator(as_word)] = "auto"
    """Engines and learner share the same GPUs, one working after the other. `auto`: if there are too few GPUs
    for both."""
    take_turns: bool = True
    """Where engines and learner share devices, also with their memory: engines give theirs back while the learner
    trains, and on GPUs the learner keeps only its weights there while engines sample. False: both keep what they
    have."""
    park_learners: Literal["memory", "disk"] = "memory"
    """Where a policy's learner waits while another policy trains. memory: its processes stay. disk: they end, and start
    again from the last checkpoint."""
    transport: Transport = "auto"
    """How weights reach the engines. `auto`: shared_memory on CPU, ipc when colocated in pairs, nccl otherwise."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Longest wait for resources and engines, in seconds."""
    push_timeout_s: float = Field(300.0, gt=0)
    """Deadline of a weight push, in seconds."""
    heartbeat_timeout_s: float = Field(60.0, gt=0)
    """A rollout worker whose engine does not answer for so long while it samples is killed and replaced, in seconds. An
    engine answers between two steps: more than the longest step takes."""


class TrackingConfig(Section):
    profile: bool = False
    """Write a timeline of the first iteration that is worked on, all actors beside each other: `profile.json`."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project. Null: off."""
    mlflow_experiment: str | None = None
    """MLflow experiment. Null: off."""
