"""Train the tiny base model that ships in `models/tiny-searcher`, from scratch, on two CPU cores.

    make base-model

A Qwen2-architecture model of about 3.3 million parameters (`--hidden-size` and `--layers` make others) with its own
byte-level BPE learns the agent's protocol from gold trajectories on generated worlds of the partition `pretrain`, whose
names occur in no world of the partition `default` (`pipeline/core/data/world/names.py`): what it can learn here is to
read, to copy and to follow the format, not a single fact of the demo. The searcher that it imitates is impatient: with
many questions of several steps it settles for what its first search found. How often depends on how a question begins
and on whether it compares: so the model has to read the question to know when to stop. To search on wherever that is
needed is left for EM to discover.

The steps: worlds -> tokenizer -> gold trajectories with passages from a real dense search, and lessons in comparing
-> copying random strings -> next-token training, mostly on what the agent writes (length-sorted batches,
right-padded, bfloat16 autocast).

Copying comes first because a small model finds it late: it needs induction heads (Olsson et al. 2022, "In-context
Learning and Induction Heads"), which look for what followed an earlier occurrence of the current token. Two helps make
them appear within minutes: initial biases with which some heads look at the previous token, and strings that repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pipeline.core.config import AgentConfig
from pipeline.core.data.cold_start import synthesise
from pipeline.core.data.questions import read_questions
from pipeline.core.data.world.questions import generate_questions
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.data.world.writer import write_world
from pipeline.core.losses.token_logprobs import token_logprobs
from pipeline.core.records import Example, Question
from pipeline.core.renderer import Renderer
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.corpus import read_corpus
from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine

VOCABULARY = 512
PARTITION = "pretrain"
PAD, EOS = "<|pad|>", "<|end|>"
AGENT = AgentConfig(documents=2, max_document_tokens=128, max_turn_tokens=96)
MAX_LENGTH = 1536
READING_WEIGHT = 0.25
"""Weight of predicting the passages and questions: it teaches the names' tokens and how to copy them."""
PREVIOUS_TOKEN_BIAS = 4.0
COMPARING = {"same or not": {"yes_no"}, "which is larger": {"comparison", "bridge_comparison"}}
"""Types of questions that compare, by what the conclusion takes."""
COPY_LENGTHS = (32, 64, 128, 256, 512)
COPY_ACCURACY = 0.9

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument(
        "--work", type=Path, help="keep worlds and indexes here (default: a temporary directory)"
    )
    parser.add_argument("--worlds", type=int, default=12, help="generated worlds of 2,000 passages each")
    parser.add_argument(
        "--settle",
        type=float,
        nargs=3,
        default=(0.9, 0.3, 0.2),
        metavar=("IMPATIENT", "PATIENT", "COMPARING"),
        help="probabilities that the searcher it imitates settles for what the first search found: for questions "
        "that begin one way, for the others, and for those that compare",
    )
    parser.add_argument(
        "--hidden-size", type=int, default=256, help="a multiple of 64: two heads of 32 for each key"
    )
    parser.add_argument(
        "--comparisons",
        type=int,
        default=8000,
        metavar="QUESTIONS",
        help="of each world; a quarter of them compare, and are lessons in drawing the conclusion",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=float, default=13.0, help="millions of tokens to train on")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per optimiser step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    seeds = range(1000, 1000 + arguments.worlds)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        worlds = [make_world(work, seed) for seed in seeds]
        tokenizer = train_tokenizer(worlds)
        renderer = Renderer(tokenizer, AGENT)
        examples = [e for world in worlds for e in gold_examples(world, renderer, arguments)]
    examples += [e for seed in seeds for e in comparisons(seed, renderer, arguments.comparisons)]
    console.print(f"{len(examples):,} gold trajectories, {sum(len(e.token_ids) for e in examples):,} tokens")
    model = new_model(tokenizer, arguments.hidden_size, arguments.layers)
    console.print(f"{model.num_parameters():,} parameters")
    learner = Learner(model, arguments.learning_rate)
    learn_to_copy(learner, arguments)
    train(learner, examples, arguments)
    for what, types in COMPARING.items():
        unseen = list(comparisons(seeds.stop, renderer, 4000, types))
        share = concluded(learner, unseen, arguments.batch_tokens)
        console.print(f"{what}, in another world: {share:.1%} of {len(unseen)}")
    model.to(torch.float32).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def make_world(work: Path, seed: int) -> Path:
    out = work / f"world-{seed}"
    write_world(out, seed=seed, size="small", partition=PARTITION)
    build_index([str(out / "corpus.jsonl")], work / f"index-{seed}", EncoderSpec("minilm"))
    return out


def train_tokenizer(worlds: Sequence[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; the protocol's tags and the chat marks are tokens of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    tags = [
        s
        for pair in (AGENT.tags.think, AGENT.tags.search, AGENT.tags.record, AGENT.tags.answer)
        for s in pair
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(tags) - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((line for world in worlds for line in _texts(world)), trainer)
    bpe.add_special_tokens([PAD, EOS])
    bpe.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, model_max_length=4096)


def _texts(world: Path) -> Iterator[str]:
    for passage in read_corpus([world / "corpus.jsonl"]):
        yield f"{passage.title}: {passage.text}"
    for question in read_questions([str(world / "train.jsonl")]):
        yield question.text
        yield from (f"{hop.question} {hop.evidence}" for hop in question.decomposition)


def gold_examples(world: Path, renderer: Renderer, arguments: argparse.Namespace) -> list[Example]:
    """The world's training questions as trajectories of a searcher who does each step right, but is impatient."""
    searcher = SearchEngine.open(world.with_name(world.name.replace("world", "index")))
    passages = {p.id: p for p in read_corpus([world / "corpus.jsonl"])}
    generator = random.Random(f"{arguments.seed} {world.name}")
    questions = [
        first_step(question) if generator.random() < settling(question, arguments.settle) else question
        for question in read_questions([str(world / "train.jsonl")])
    ]
    hits = search_all(searcher, questions)

    async def retrieve(query: str, k: int) -> Sequence[Hit]:
        return hits[query][:k]

    result = asyncio.run(
        synthesise(questions, renderer, retrieve, passages.get, max_length=MAX_LENGTH, seed=0)
    )
    console.print(f"{world.name}: {len(result.trajectories)} trajectories, skipped {dict(result.skipped)}")
    answers = {q.id: q.answers[0] for q in questions}
    return [renderer.with_gold_answer(t, answers[t.question_id], 1.0) for t in result.trajectories]


def settling(question: Question, probabilities: Sequence[float]) -> float:
    """How likely the searcher is to settle; decided by the first two words of a question that does not compare."""
    impatient, patient, comparing = probabilities
    if question.type != "bridge":
        return comparing
    opening = " ".join(question.text.split()[:2])
    return patient if zlib.crc32(opening.encode()) % 2 else impatient


def comparisons(
    seed: int, renderer: Renderer, count: int, types: Container[str] = frozenset().union(*COMPARING.values())
) -> Iterator[Example]:
    """Questions of a world that compare, with all their records, as lessons in drawing the conclusion alone.

    In a trajectory that is one token among a hundred that the agent writes: from so few of them a model this small
    learns to guess.
    """
    (opening, closing), (answer, _) = AGENT.tags.record, AGENT.tags.answer
    spec = WorldSpec.of_size(seed, "small", PARTITION)
    for question in generate_questions(spec, "train", count):
        if question["type"] not in types:
            continue
        found = "".join(f"{opening} {hop['evidence']} {closing}\n" for hop in question["decomposition"])
        context = renderer.prompt_ids(question["question"]) + renderer.trusted_ids(f"{found}{answer}")
        gold = renderer.answer_ids(question["answers"][0])
        mask = np.repeat([False, True], [len(context), len(gold)])
        yield Example(
            question["id"], question["id"], "searcher", np.array([*context, *gold], np.int32), mask, {}
        )


def first_step(question: Question) -> Question:
    """The question as an impatient searcher sees it, who answers with what the first search found."""
    hop = question.decomposition[0]
    return replace(question, answers=(hop.answer,), decomposition=(hop,))


def search_all(searcher: SearchEngine, questions: Sequence[Question]) -> dict[str, list[Hit]]:
    queries = sorted({hop.question for question in questions for hop in question.decomposition})
    return dict(zip(queries, searcher.search(queries, AGENT.documents), strict=True))


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    look_at_previous_token(model)
    return model


def look_at_previous_token(model: Qwen2ForCausalLM) -> None:
    """Initial query and key biases with which half of the heads of the first two layers prefer the token before.

    The rotary embedding turns the bias pair i by position * theta_i; a query turned back by one more theta_i has its
    largest product, the sum of cos((distance - 1) * theta_i), at distance one.
    """
    config = model.config
    kv_heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    queries_per_kv = config.num_attention_heads // kv_heads
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(width // 2) / (width // 2))
    key = PREVIOUS_TOKEN_BIAS * torch.cat([torch.ones_like(theta), torch.zeros_like(theta)])
    query = PREVIOUS_TOKEN_BIAS * torch.cat([theta.cos(), -theta.sin()])
    for layer in model.model.layers[:2]:
        heads = kv_heads // 2
        layer.self_attn.k_proj.bias.data[: heads * width] = key.repeat(heads)
        layer.self_attn.q_proj.bias.data[: heads * queries_per_kv * width] = query.repeat(
            heads * queries_per_kv
        )


class Learner:
    """A model and its optimiser: one call, one step."""

    def __init__(self, model: Qwen2ForCausalLM, learning_rate: float) -> None:
        self.model = model
        self._peak = learning_rate
        self._optimiser = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def logits(self, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Next-token logits [N, V] of the N true places of `where` [B, T] (never the first column)."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: torch.Tensor = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return logits[where[:, 1:]]

    def step(self, loss: torch.Tensor, rate: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._peak * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()


def learn_to_copy(learner: Learner, arguments: argparse.Namespace) -> None:
    """Random strings that repeat with a random period, longer whenever the model has learnt to copy these."""
    generator = np.random.default_rng(arguments.seed)
    start, step = time.perf_counter(), 0
    for length in COPY_LENGTHS:
        accuracies: list[float] = []
        while len(accuracies) < 5 or np.mean(accuracies[-5:]) < COPY_ACCURACY:
            periods = generator.integers(4, length // 2, max(1, arguments.batch_tokens // length))
            strings = [generator.integers(2, VOCABULARY, period) for period in periods]
            ids = torch.from_numpy(np.stack([np.resize(string, length) for string in strings]))
            logits = learner.logits(ids, torch.ones_like(ids, dtype=torch.bool))
            targets = ids[:, 1:].flatten()
            learner.step(-token_logprobs(logits, targets).mean(), rate=min(1.0, (step + 1) / 50))
            right = (logits.argmax(-1) == targets).view(len(ids), -1)
            accuracies.append(right[:, length // 2 :].float().mean().item())
            step += 1
            if step % 50 == 0:
                log(start, copying=length, step=step, accuracy=accuracies[-1])
    log(start, copying="learnt", step=step)


def train(learner: Learner, examples: Sequence[Example], arguments: argparse.Namespace) -> None:
    generator = np.random.default_rng(arguments.seed)
    budget, start = int(arguments.tokens * 1e6), time.perf_counter()
    seen = step = 0
    accuracies: list[float] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=budget)
        while seen < budget:
            for batch in batches(examples, arguments.batch_tokens, generator):
                ids, mask, written = collate(batch, learner.model.config.pad_token_id)
                logits = learner.logits(ids, written)
                targets, own = ids[:, 1:][written[:, 1:]], mask[:, 1:][written[:, 1:]]
                logprobs = token_logprobs(logits, targets)
                loss = -logprobs[own].mean() - READING_WEIGHT * logprobs[~own].mean()
                learner.step(loss, schedule(seen / budget))
                accuracies.append((logits.argmax(-1) == targets)[own].float().mean().item())
                seen += sum(len(e.token_ids) for e in batch)
                step += 1
                if step % 100 == 0:
                    log(start, step=step, tokens=seen, loss=loss.item(), accuracy=np.mean(accuracies[-100:]))
                progress.update(bar, completed=min(seen, budget))
                if seen >= budget:
                    break


def concluded(learner: Learner, examples: Sequence[Example], batch_tokens: int) -> float:
    """The share of examples whose targets are all the likeliest tokens."""
    right: list[bool] = []
    for batch in batches(examples, batch_tokens, np.random.default_rng(0)):
        ids, mask, _ = collate(batch, learner.model.config.pad_token_id)
        with torch.no_grad():
            logits = learner.logits(ids, mask)
        hits = (logits.argmax(-1) == ids[:, 1:][mask[:, 1:]]).split(mask.sum(1).tolist())
        right += [bool(hit.all()) for hit in hits]
    return float(np.mean(right))


def log(start: float, **values: object) -> None:
    rounded = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(rounded | {"seconds": round(time.perf_counter() - start)}), flush=True)


def batches(
    examples: Sequence[Example], batch_tokens: int, generator: np.random.Generator
) -> Iterator[list[Example]]:
    """Batches of examples of similar length, in random order."""
    keys = np.array([len(e.token_ids) for e in examples]) + generator.uniform(0, 64, len(examples))
    groups: list[list[Example]] = [[]]
    for index in np.argsort(keys):
        example = examples[index]
        if groups[-1] and len(example.token_ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    for index in generator.permutation(len(groups)):
        yield groups[index]


def collate(batch: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, what the agent wrote, what anyone wrote; [B, T], padded on the right: causal attention needs no mask."""
    length = max(len(e.token_ids) for e in batch)
    ids = torch.full((len(batch), length), pad, dtype=torch.long)
    mask = torch.zeros((len(batch), length), dtype=torch.bool)
    written = torch.zeros((len(batch), length), dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.token_ids)] = torch.from_numpy(example.token_ids.astype(np.int64))
        mask[row, : len(example.token_ids)] = torch.from_numpy(example.loss_mask)
        written[row, : len(example.token_ids)] = True
    return ids, mask, written


def schedule(progress: float) -> float:
    """Linear warm-up over 3 %, then cosine to a tenth."""
    if progress < 0.03:
        return max(progress, 1e-3) / 0.03
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * progress)))


if __name__ == "__main__":
    main()
