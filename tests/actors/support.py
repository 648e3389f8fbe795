"""Tiny random models, their transformers twin, and a way to push to an engine without Ray."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actors.engine import VllmEngine
from pipeline.core.agents.program import Sampling

T = TypeVar("T")

CORPUS = [
    "<think> who wrote the book? </think>",
    "<record> the author was born in a small town by the sea </record>",
    "<answer> twenty-one </answer>",
    "the quick brown fox jumps over the lazy dog while seven wizards box 0123456789",
]


def build_tokenizer(path: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE; `<answer>` and `</answer>` are added tokens, the other tags plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<answer>", "</answer>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        path
    )


def build_model(
    path: Path,
    architecture: str = "Qwen2",
    *,
    tied: bool = True,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocab_size: int = 300,
) -> Path:
    """A random model with peaked predictions (so that greedy choices do not hang on rounding) and its tokenizer."""
    import torch
    import transformers

    build_tokenizer(path, vocab_size)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=vocab_size + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,  # vLLM on CPUs wants heads of 32 or more
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


@dataclass
class EngineFixture:
    """An engine and the loop it lives on; `run` executes a coroutine there."""

    engine: VllmEngine
    model_path: Path
    run: Callable[[Coroutine[Any, Any, T]], T]


class LocalEngines:
    """`actors.weight_transfer.Engines` without Ray: calls the engine's coroutines on its loop, one after the other."""

    def __init__(self, fixture: EngineFixture) -> None:
        self.fixture = fixture
        self.world_sizes = [1]
        self.missed: dict[int, str] = {}
        self.remote = False

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        return [self.fixture.run(getattr(self.fixture.engine, method)(*args))]

    def call_each(self, method: str, args: Any, timeout_s: float) -> list[Any]:
        return [self.fixture.run(getattr(self.fixture.engine, method)(args[0]))]

    def send_segment(self, manifest: dict[str, Any], segment: Any, timeout_s: float) -> None:
        if self.remote:
            payload = segment.room(manifest["nbytes"]).numpy().copy()
            self.call("update_weights", manifest, payload, timeout_s=timeout_s)
        else:
            self.call("update_weights", {**manifest, "path": segment.path}, timeout_s=timeout_s)


class HfModel:
    """The same model in transformers: the reference for what the engine should compute."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) for i = 1, 2, ..."""
        import torch

        with torch.no_grad():
            table = self.model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
        return table.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()

    def truncated_logprobs(self, token_ids: list[int], sampling: Sampling) -> list[float]:
        """log q of the same tokens: tempered, the `top_k` most likely, and of these the fewest that make up `top_p`."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([token_ids])).logits[0, :-1] / sampling.temperature
        values, order = logits.sort(descending=True)
        values[:, sampling.top_k :] = -torch.inf
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        kept = torch.where(before < sampling.top_p, values, -torch.inf).log_softmax(-1)
        table = torch.empty_like(kept).scatter(1, order, kept)
        return table.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()

    def greedy(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        import torch

        output = self.model.generate(
            torch.tensor([prompt_ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        return output[0, len(prompt_ids) :].tolist()

    def buckets(self, num_tensors: int = 3) -> Iterator[list[tuple[str, Any]]]:
        """Its weights under their checkpoint names, a few at a time, as a learner would give them."""
        named = list(self.model.named_parameters())
        for start in range(0, len(named), num_tensors):
            yield named[start : start + num_tensors]

    def perturb(self, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
