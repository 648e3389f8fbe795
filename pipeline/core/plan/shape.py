"""The sizes of a model that memory and time depend on, from its configuration alone: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import UserError
from retriever_service.imports import quick_imports


class UnknownShape(UserError):
    """The configuration is not of a decoder whose sizes are known."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, in numbers of elements. Symbols as in the formulas of this folder."""

    parameters: int
    """F: tied weights counted once."""
    largest_tensor: int
    """Elements of the largest parameter: the embedding, as a rule."""
    layer_parameters: int
    """Of the largest decoder layer."""
    layers: int
    """L."""
    hidden: int
    """h."""
    mlp: int
    """f: width of the feed-forward part."""
    heads: int
    kv_heads: int
    head_dim: int
    normalised: int
    """Elements of a token that a layer's normalisations take, all together: 2h, and more where outputs, or queries and
    keys, are normalised as well."""
    vocabulary: int
    """V."""
    windows: tuple[int | None, ...]
    """Of each layer: how many tokens it attends to; None for all."""

    @property
    def attention(self) -> int:
        """a: width of queries and of attention's output."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """k: width of the keys, and of the values."""
        return self.kv_heads * self.head_dim


def read_shape(path: str) -> ModelShape:
    """The shape of a model directory or hub name. Of a directory `config.json` is enough.

    Raises:
        UnknownShape: there is no configuration that transformers knows, or it is not of a decoder.
    """
    return shape_of(read_model_config(path))


def read_model_config(path: str) -> Any:
    """The transformers configuration of a model directory or hub name.

    Raises:
        UnknownShape: there is none that transformers knows, or it is out of reach.
    """
    with quick_imports():  # also around the first use, which imports more
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, StrictDataclassError) as error:
            raise UnknownShape(
                f"model.path: the configuration of {path} cannot be read ({str(error).splitlines()[0]}); give a "
                "directory with the model's config.json, or fetch the model first"
            ) from error


def shape_of(config: Any) -> ModelShape:
    """The shape of a transformers configuration.

    Parameters are counted on the meta device: the modules are built, and nothing is allocated.

    Raises:
        UnknownShape: transformers has no causal language model for it, or one without attention heads.
    """
    with quick_imports():
        import torch
        from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        layers = _layers(model, text.num_hidden_layers)
        heads = text.num_attention_heads
    except (ValueError, AttributeError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UnknownShape(
            f"model.path: {config.name_or_path}: a {config.model_type} is no language model whose sizes are known here "
            f"({error!r:.200})"
        ) from error
    sizes = [parameter.numel() for parameter in model.parameters()]  # a tied one comes once
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=sum(sizes),
        largest_tensor=max(sizes),
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        layers=len(layers),
        hidden=text.hidden_size,
        mlp=_mlp_width(text),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        normalised=_normalised(layers[0], {"q": heads * head_dim, "k": kv_heads * head_dim}),
        vocabulary=text.vocab_size,
        windows=_windows(text),
    )


def _layers(model: Any, count: int) -> list[Any]:
    from torch.nn import ModuleList

    for module in model.modules():
        if isinstance(module, ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"it has no list of {count} layers")


def _normalised(layer: Any, of_heads: dict[str, int]) -> int:
    """Of the modules that are named norms; those of queries and keys may have one scale for all heads."""
    total = 0
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        if "norm" in last and (scale := getattr(module, "weight", None)) is not None:
            total += of_heads.get(last[0], 0) if last in ("q_norm", "k_norm") else scale.numel()
    return total


def _mlp_width(text: Any) -> int:
    width: int | Sequence[int] = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return width if isinstance(width, int) else max(width)


def _windows(text: Any) -> tuple[int | None, ...]:
    """Of each layer. Old configurations name a window for all layers, and some switch it off by another key."""
    window: int | None = getattr(text, "sliding_window", None)
    layers: int = text.num_hidden_layers
    if window is None or not getattr(text, "use_sliding_window", True):
        return (None,) * layers
    kinds: list[str] = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
