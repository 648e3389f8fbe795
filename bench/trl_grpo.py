"""TRL's GRPO on the generated encyclopedia: an outside peer of the recipe `grpo`.

    python -m bench.trl_grpo --world runs/world --out runs/trl --model runs/grpo/iterations/0000/searcher/model \\
        --index runs/grpo/index [--config configs/grpo-demo.yaml] [key=value ...]

Written for TRL 1.16.0, which ExSearch does not depend on: it must be installed by hand, without its dependencies, which
are there (`pip install --no-deps trl==1.16.0`), better into an environment of its own.

Of ours are the prompts, the search agent, the retriever, the reward and the evaluation; of TRL's `GRPOTrainer` the
model, the advantages, the loss and the optimiser. Its `rollout_func`, an interface that TRL calls experimental, runs
the agent on TRL's model in lock-step (`bench.lock_step`), as TRL's own loop of turns does. What generates is
transformers: with vLLM, TRL wants a GPU. The configuration is that of the recipe, and its keys mean the same, but for:

- `grpo.mean_over`: `group` becomes TRL's `dapo`, a mean over all tokens that were sampled; `step` is `bnpo`, `sequence`
  `grpo`;
- the learning rate is constant;
- advantages are divided by the standard deviation plus 1e-4;
- old log-probabilities are those of a pass of TRL's own, not those that sampling recorded.

OUT/report.json has the keys of a run's own report: per iteration trajectories, generated tokens, seconds of sampling
and of training, dev scores; test scores of the start and of the best iteration. Models are in OUT as in a run. Nothing
is resumed.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.lock_step import LockStep
from pipeline import methods
from pipeline.core.agents.program import GREEDY, Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.evaluation import evaluate
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Episode, Question, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.report import best_iteration, step_outcome, step_report
from pipeline.core.retrieval import prepare_index
from pipeline.core.run import Json, RunFiles, write_json
from pipeline.recipes.grpo import COLUMNS, LEGEND, GroupAdvantages, Settings, check
from retriever_service.search.engine import SearchEngine

VERSION = "1.16.0"
LOSS_TYPES = {"group": "dapo", "sequence": "grpo", "step": "bnpo"}


class Peer:
    """What TRL asks for, and what is written down of it.

    Args:
        config: of the recipe `grpo`.
        model: TRL's, before it is trained.
        renderer: of its tokenizer.
        engine: what is searched.
        out: folder of models and figures; its steps are those of a run.
    """

    def __init__(
        self, config: Config, model: Any, renderer: Renderer, engine: SearchEngine, out: Path
    ) -> None:
        self.config, self.model, self.files = config, model, RunFiles(out)
        self.settings: Settings = config.of_recipe
        splits = load_splits(config.data, config.seed, required=("train", "dev"))
        self.train, self.dev, self.test = splits.train, splits.dev, splits.test
        self._renderer, self._engine = renderer, engine
        self._by_id = {question.id: question for question in splits.train}
        self._weigh = GroupAdvantages(self.settings.reward, self.settings.scale, config.evaluation.protocol)
        self._iteration, self._training_since = 0, 0.0

    def rollout(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: a trajectory for each prompt, which is the id of a question.

        Returns:
            prompt_ids, completion_ids: token ids; a completion is all behind the question, passages included.
            logprobs: None; TRL computes them.
            env_mask: 1 on what the model wrote, 0 on what it did not.
            reward: None where the infrastructure failed.
        """
        self.end_iteration()
        self._iteration += 1
        began = time.perf_counter()
        counts: defaultdict[str, int] = defaultdict(int)
        tasks: list[tuple[Question, int]] = []
        for name in prompts:
            tasks.append((self._by_id[name], counts[name]))
            counts[name] += 1
        sampling = Sampling.of(self.config.rollout, self.config.seed)
        trajectories = self._agents(keeps_mistakes=True).run(tasks, sampling)
        self._note_sampling(trajectories, time.perf_counter() - began)
        lengths = [len(self._renderer.prompt_ids(task.text)) for task, _ in tasks]
        behind = list(zip(trajectories, lengths, strict=True))
        self._training_since = time.perf_counter()
        return {
            "prompt_ids": [t.token_ids[:length].tolist() for t, length in behind],
            "completion_ids": [t.token_ids[length:].tolist() for t, length in behind],
            "logprobs": None,
            "env_mask": [t.loss_mask[length:].astype(int).tolist() for t, length in behind],
            "reward": [self._reward(t) for t in trajectories],
        }

    def end_iteration(self) -> None:
        """What was sampled before is trained on: note how long that took, and score the dev questions."""
        t = self._iteration
        if t:
            seconds = time.perf_counter() - self._training_since
            write_json(self.files.at(f"{t}/{SEARCHER}/train.json"), {"seconds": seconds})
        if self.settings.is_evaluated(t):
            began = time.perf_counter()
            scores = self.scores(self.dev)
            seconds = time.perf_counter() - began
            write_json(self.files.at(f"{t}/evaluation.json"), {"scores": scores, "seconds": seconds})
            self.model.save_pretrained(self.files.at(f"{t}/{SEARCHER}/model"))
            self._renderer.tokenizer.save_pretrained(self.files.at(f"{t}/{SEARCHER}/model"))
            print(f"iteration {t}: dev EM {scores['em']:.1f}", flush=True)

    def scores(self, questions: Sequence[Question]) -> Json:
        """Greedy, by our own evaluation."""
        trajectories = self._agents().run([(question, 0) for question in questions], GREEDY)
        own = self.config.evaluation
        return evaluate(questions, trajectories, own.bootstrap_samples, self.config.seed, own.protocol)

    def test_both(self) -> None:
        """Test scores of the model as it was, and of the best iteration."""
        for name, iteration in (("start", 0), ("best", best_iteration(self.files, self.settings))):
            path = self.files.at(f"{iteration}/{SEARCHER}/model")
            self.model = load_model(str(path))
            write_json(self.files.at(f"test/{name}.json"), {"iteration": iteration} | self.scores(self.test))

    def _agents(self, *, keeps_mistakes: bool = False) -> LockStep:
        longest = self.config.model.max_length
        return LockStep(self.model, self._renderer, self._engine, longest, keeps_mistakes=keeps_mistakes)

    def _reward(self, trajectory: Trajectory) -> float | None:
        if trajectory.stop_reason.is_infrastructure:
            return None
        return self._weigh.reward_of(self._by_id[trajectory.question_id], trajectory)

    def _note_sampling(self, trajectories: Sequence[Trajectory], seconds: float) -> None:
        """The figures that a run notes, by the same code."""
        episodes: defaultdict[str, list[Episode]] = defaultdict(list)
        for one in trajectories:
            episodes[one.question_id].append(Episode(one.question_id, one.sample, (one,)))
        rows = [self._weigh(self._by_id[name], own).statistics for name, own in episodes.items()]
        tokens = sum(int(one.sampled.sum()) for one in trajectories)
        figures = {"trajectories": len(trajectories), "generated_tokens": tokens, "seconds": seconds}
        write_json(
            self.files.at(f"{self._iteration}/sample.json"), {**self._weigh.summarise(rows), **figures}
        )


def reward_of(reward: Sequence[float | None], **_: Any) -> list[float | None]:
    """TRL's reward function: `rollout` has it already."""
    return list(reward)


def arguments_of(config: Config, questions: int, out: Path) -> dict[str, Any]:
    """The recipe's settings as TRL's.

    Raises:
        UserError: what an iteration samples is no whole number of optimiser steps.
    """
    settings: Settings = config.of_recipe
    learner, samples = config.learner, config.rollout.samples
    sampled = settings.sampled_questions(questions) * samples
    if sampled % learner.batch_size:
        raise UserError(
            f"TRL takes whole batches: {sampled} trajectories of an iteration (grpo.questions_per_step times "
            f"rollout.samples) are no multiple of learner.batch_size, {learner.batch_size}"
        )
    steps = sampled // learner.batch_size
    return {
        "output_dir": str(out / "trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "seed": config.seed,
        "num_generations": samples,
        "per_device_train_batch_size": learner.batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": steps,
        "num_iterations": learner.epochs,
        "max_steps": settings.iterations * steps * learner.epochs,
        "max_completion_length": config.model.max_length,
        "temperature": 1.0,
        "learning_rate": learner.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": learner.weight_decay,
        "adam_beta1": learner.adam_betas[0],
        "adam_beta2": learner.adam_betas[1],
        "adam_epsilon": learner.adam_epsilon,
        "max_grad_norm": learner.gradient_clipping,
        "gradient_checkpointing": learner.gradient_checkpointing,
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "beta": settings.kl_coefficient,
        "scale_rewards": "group" if settings.scale == "std" else "none",
        "loss_type": LOSS_TYPES[settings.mean_over],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load_model(path: str) -> Any:
    """In float32, as the learner on CPUs."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def import_trl() -> Any:
    """
    Raises:
        UserError: it is not there.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError(
            f"bench.trl_grpo needs TRL, which ExSearch does not depend on ({error}): pip install --no-deps "
            f"trl=={VERSION}, best into a copy of this environment"
        ) from error
    return trl


def run(config: Config, out: Path) -> Json:
    """The report of a whole training.

    Raises:
        UserError: TRL is not there, settings with which it is another method, or OUT is used already.
    """
    trl = import_trl()
    check(config)
    if (out / "iterations").exists():
        raise UserError(f"{out} holds the figures of another training; choose another --out")
    from datasets import Dataset

    tokenizer, model = load_tokenizer(config.model.path), load_model(config.model.path)
    engine = SearchEngine.open(prepare_index(config.retriever, config.data, out / "index", Display()))
    peer = Peer(config, model, Renderer(tokenizer, config.agent), engine, out)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward_of,
        args=trl.GRPOConfig(**arguments_of(config, len(peer.train), out)),
        train_dataset=Dataset.from_list([{"prompt": question.id} for question in peer.train]),
        processing_class=tokenizer,
        rollout_func=peer.rollout,
    )
    trainer.train()
    peer.end_iteration()
    if peer.test:
        peer.test_both()
    report = step_report(peer.files, "trl_grpo", config.seed, peer.settings) | {"trl": trl.__version__}
    write_json(out / "report.json", report)
    return report


def main() -> None:
    """Trains, and prints the tables of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=Path, required=True, help="folder that `exsearch world` has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="to start from; default: that of the configuration")
    parser.add_argument("--index", type=Path, help="default: it is built")
    parser.add_argument("--config", type=Path, default=Path("configs/grpo-demo.yaml"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    given = parser.parse_args()
    paths = {"data.root": given.world, "model.path": given.model, "retriever.index": given.index}
    overrides = [f"{key}={path}" for key, path in paths.items() if path is not None]
    try:
        report = run(methods.load(given.config, [*overrides, *given.overrides]), given.out)
    except UserError as error:
        parser.error(str(error))
    Display().outcome(step_outcome(report, COLUMNS, LEGEND))


if __name__ == "__main__":
    main()
