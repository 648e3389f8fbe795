"""How it is learnt: sampling, weights, training, iterations, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.core.config.section import OnDisk, Section, Sources
from pipeline.core.scoring.answers import METRICS, ProtocolName

Attention = Literal["packed", "flash_attention_2", "eager"]
Dtype = Literal["float32", "bfloat16"]
Weighting = Literal["likelihood", "posterior", "length_normalised", "reward", "uniform"]


class RolloutConfig(Section):
    workers: int = Field(1, ge=1)
    """vLLM engines that a run starts with; spread over the nodes."""
    max_workers: int | None = Field(None, ge=1)
    """Engines that a run may grow to, as nodes bring room: each takes part as soon as it is up. Null: `workers`."""
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
    concurrency: int | None = Field(None, ge=1)
    """Agents in flight per worker. Null: as many as the engine's KV cache holds when each is half of
    `model.max_length` long, at most 512 on GPUs and 256 on CPUs."""
    questions_per_shard: int = Field(256, ge=1)
    """Questions per shard of trajectories in the run directory. Of those that are done a killed run loses a
    minute's worth at most, and fewer than a shard."""
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
    """How often workers of a policy may die, hang or fail to start in one phase and are replaced; then it goes on
    without those that fail. The weighting actor may die as often in one phase; once more, and the run stops."""
    min_workers: int = Field(1, ge=1)
    """With fewer, and none that can be replaced, the run stops. Lost ones are tried again in the next phase. So many
    are enough to start with where the others found no room within `cluster.start_timeout_s`."""
    max_failure_share: float = Field(0.1, ge=0, le=1)
    """A phase stops with an error when more than this share of trajectories fails for infrastructure reasons. Of a
    retriever that gives one senseless answer in fifty, a trajectory of five searches meets one in ten times."""

    @model_validator(mode="after")
    def _can_have_so_many(self) -> RolloutConfig:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than workers ({self.workers})")
        if self.most_workers < self.workers:
            raise ValueError(f"max_workers ({self.max_workers}) is less than workers ({self.workers})")
        return self

    @property
    def most_workers(self) -> int:
        """The most that there may ever be."""
        return self.workers if self.max_workers is None else self.max_workers

    def with_fewest(self) -> RolloutConfig:
        """Start with `min_workers`; the others may come later."""
        return self.model_copy(update={"workers": self.min_workers, "max_workers": self.most_workers})

    def with_one(self, **changes: Any) -> RolloutConfig:
        """One engine, now and later, where a phase needs no more; with other changes."""
        return self.model_copy(update={"workers": 1, "min_workers": 1, "max_workers": None, **changes})


def _is_reward(name: str) -> str:
    if name not in METRICS and ":" not in name:
        raise ValueError(
            f"should be {', '.join(METRICS)} or a function of your own, as module:function (docs/rewards.md)"
        )
    return name


RewardName = Annotated[str, AfterValidator(_is_reward)]

METHODS_OF = {
    "floor": ("posterior",),
    "self_normalised": ("length_normalised", "reward"),
    "reward": ("reward",),
    "temperature": ("likelihood", "posterior", "length_normalised"),
}
"""Keys of `weighting` that mean something with these methods alone."""


class WeightingConfig(Section):
    """A bare string is short for its `method`: `weighting=uniform`."""

    method: Weighting = "likelihood"
    """likelihood: p(y|x,z), of several gold answers their sum. posterior: softmax of it over the question's K.
    length_normalised: exp(mean log p per token) of the best gold answer. uniform: 1/K. They train the trajectory with
    the gold answer in place. reward: what `reward` gives the trajectory, and its own answer is trained."""
    temperature: float = Field(1.0, gt=0)
    """tau: answer log-likelihoods are divided by it (all methods but reward and uniform)."""
    floor: float = Field(0.0, ge=0)
    """epsilon added to the posterior's denominator: questions whose trajectories all fail fade out."""
    self_normalised: bool = False
    """length_normalised and reward: divide by the sum over the question's K trajectories. Of rewards that is MaxRL's
    mean normalisation: a question counts alike however many succeed, and not at all if none does."""
    reward: RewardName = "f1"
    """Of `method: reward`: em, f1 or accuracy of the trajectory's own answer, or a function of your own, as
    module:function (docs/rewards.md)."""
    max_weight: float | None = Field(None, gt=0)
    """Weights above are clipped to it. Null: no clipping."""
    correct_proposal: bool = False
    """Multiply by the clipped ratio p(z)/q(z) where sampling was not at temperature 1 without truncation."""
    max_ratio: float = Field(2.0, ge=1)
    """Clip of that ratio."""
    subtract_baseline: bool = False
    """likelihood and posterior: subtract p(y|x) in front of the first turn from p(y|x,z), down to 0, so that an answer
    that can be guessed (yes or no) earns nothing for it. Both are tempered by tau. Scores once more per trajectory."""
    credit: Literal["trajectory", "turn"] = "trajectory"
    """trajectory: all its tokens weigh the same. turn (likelihood and posterior): each turn weighs what p(y|x,z up to
    here) gains with it and, by `credit_decay`, with the turns behind it; 0 for a loss. Scores once more per turn."""
    credit_decay: float = Field(1.0, ge=0, le=1)
    """lambda of `credit: turn`. 1: a turn has the credit of all that is gained from it on. 0: of its own gain alone."""
    merge_copies: bool = True
    """Train exact copies among the examples of a question once, with their summed weight: the same gradient from fewer
    tokens."""

    @property
    def compares(self) -> bool:
        """True if the weight of the only trajectory of a question would be 1, whatever its likelihood or reward."""
        return self.self_normalised or (self.method == "posterior" and self.floor == 0)

    @property
    def scored_turns(self) -> Literal["none", "first", "all"]:
        """In front of which turns the gold answers must be scored."""
        if self.credit == "turn":
            return "all"
        return "first" if self.subtract_baseline else "none"


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
    """Number format of the forward and backward pass. `auto`: bfloat16 on GPUs, float32 on CPUs, which without AMX
    may take longer over bfloat16 (docs/performance.md)."""
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
    installed. eager: plain matrix products, slow; for comparison, and for soft-capping (Gemma 2)."""
    share_prefixes: bool = True
    """Compute what the trajectories of a question begin with in common once; with attention: packed."""
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


class Rounds(Section):
    """How long a recipe goes on. The section of every recipe begins with these keys."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Of ExSearch's own sections (`weighting`, `cold_start`) those that the recipe reads as well."""

    iterations: int = Field(5, ge=0)
    """Iterations (the papers: 5)."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many iterations without a better dev score. Null: run all."""
    select_by: str
    """Dev metric that names the best iteration."""


class Iterations(Rounds):
    """The same of a recipe that samples answers."""

    select_by: Literal["em", "f1", "accuracy"] = "em"
    """Dev metric that names the best iteration."""
    asynchronous: bool = False
    """Sample for the next iteration while the learner trains: from the version that it trains from, so one behind.
    Where engines and learner share devices, `cluster.take_turns` must be off."""

    def sampled_questions(self, training: int) -> int:
        """Of so many training questions those that one iteration samples, at most."""
        return training

    def most_samples(self, samples: int) -> int:
        """Episodes of one of them, at most, where `rollout.samples` is `samples`."""
        return samples


class EmConfig(Iterations):
    """ExSearch's iterations of generalised EM."""

    hinted: int = Field(0, ge=0)
    """Of a question's `rollout.samples` so many are sampled with a gold answer in the prompt, for questions whose other
    trajectories all fail. They are weighted by p(z)/q(z) and trained without it. Needs `weighting.correct_proposal`."""
    further_samples: int = Field(0, ge=0)
    """So many further trajectories are sampled of a question of which none of its `rollout.samples` makes a gold answer
    likelier than not. A question with more trajectories counts as much as one with few."""
    dev_samples: int = Field(0, ge=0)
    """Trajectories per dev question that are sampled as in the E-step and scored against the gold answers, for a
    likelihood bound on dev after the cold start and every iteration. 0: no such bound. Costs what so many in the E-step
    cost."""

    def most_samples(self, samples: int) -> int:
        return samples + self.further_samples


class EvaluationConfig(Section):
    protocol: ProtocolName = "exsearch"
    """By whose rules answers are compared, in every score, in `weighting.reward` and in what counts as correct.
    exsearch: KILT's, mended for yes and no and for text beyond ASCII (docs/evaluation.md). kilt: KILT's and SQuAD's, to
    the letter. The others: those of the data set."""
    baselines: bool = True
    """Also evaluate no search, and one search then answer, on the test questions."""
    bootstrap_samples: int = Field(1000, ge=0)
    """Resamples for the 95% intervals of F1; 0: F1 has none. Those of EM and accuracy need no samples."""
