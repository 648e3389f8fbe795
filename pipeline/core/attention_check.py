"""Whether a model can be trained on packed rows, found out before anything is started.

The model is built without memory (torch's meta device) and run once on a row of two examples, without values. What it
asks of its attention says whether its examples would be computed as each would be alone: the keywords, and which tokens
each token sees according to transformers' own masks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    masking_utils,
)

from pipeline.core.attention import EAGER_INSTEAD, not_known, packed_attention
from pipeline.core.config.method import Attention
from pipeline.core.errors import UserError

logger = logging.getLogger(__name__)

PROBE = "packed-probe"
LENGTHS = (7, 5)
WINDOW = 4
"""Of sliding windows and chunks, in place of the model's own: shorter than the examples."""
EXAMPLE = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
SAME = EXAMPLE[:, None] == EXAMPLE[None, :]
"""Of each token of the row which example it is of, and of any two whether they are of one."""
PARAMETERS = inspect.signature(packed_attention).parameters
"""What `packed_attention` knows."""
KEEP_A_STATE = frozenset({"conv", "hybrid", "hybrid_sliding", "linear_attention"})
"""Kinds of layers, in transformers' words, that take something along from token to token."""
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError)
"""What a model's own code may raise where nobody thought of tensors without values."""


def check_attention(path: str, attention: Attention) -> None:
    """The learner computes this model's loss on packed rows as it would on each example alone.

    Args:
        path: a model directory, of which `config.json` is enough, or a hub name. One that cannot be read is passed
            over: whoever loads it says why.

    Raises:
        UserError: it would not.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return
    text = config.get_text_config(decoder=True)
    probe = _Probe()
    try:
        model = _without_memory(config, text, probe)
    except FAILURES as error:
        if attention == "packed":
            raise UserError(
                f"learner.attention: packed does not go with {path}: transformers cannot build it so ({error!r:.200}); "
                f"{EAGER_INSTEAD}, or take another model"
            ) from error
        return
    if model._is_stateful or KEEP_A_STATE & set(getattr(text, "layer_types", None) or ()):
        raise UserError(
            f"model.path: {path} ({config.model_type}) has layers that take a state along from token to token, and so "
            "from one example of a packed row into the next; take a model that has attention in all of its layers"
        )
    try:
        _run(model)
    except FAILURES as error:
        logger.warning(
            f"whether {path} can be trained on packed rows with learner.attention={attention} could not be found out "
            f"({error!r:.200}); compare the loss of some steps with that under another learner.attention"
        )
        return
    if problem := _problem(list(probe.requests.values()), text.num_hidden_layers, attention):
        raise UserError(f"learner.attention: {attention} does not compute what {path} does: {problem}")


@dataclass(frozen=True, slots=True)
class _Request:
    """What a module asks of its attention.

    Attributes:
        mask: which tokens each token of the row sees, bool[T, T]; None if there is no such mask.
    """

    module: str
    keywords: dict[str, Any]
    mask: Tensor | None


def _problem(requests: Sequence[_Request], layers: int, attention: Attention) -> str | None:
    """What is wrong, and how to mend it."""
    eager_does = all(request.mask is not None and not (request.mask & ~SAME).any() for request in requests)
    other = EAGER_INSTEAD if eager_does and attention == "packed" else "take another model"
    if (missing := layers - len(requests)) > 0:
        return f"{missing} of its {layers} layers do not ask transformers for their attention; take another model"
    if attention == "eager" and not eager_does:
        return f"its masks do not keep the examples of a packed row apart; {other}"
    if attention == "flash_attention_2" and any(
        request.keywords.get("position_ids") is None for request in requests
    ):
        return f"its attention is not told where the examples of a packed row begin; {other}"
    if attention == "packed":
        for request in requests:
            further = {name: x for name, x in request.keywords.items() if name not in PARAMETERS}
            if names := not_known(None, further):
                return f"{request.module} asks for {', '.join(names)}; {other}"
            if not _is_causal(request):
                return f"tokens of {request.module} see others than those of a causal window; {other}"
    return None


def _is_causal(request: _Request) -> bool:
    """Whether each token sees, of its example, what `packed_attention` lets it see."""
    position = torch.arange(sum(LENGTHS))
    distance = position[:, None] - position[None, :]
    causal = (distance >= 0) & (distance < (request.keywords.get("sliding_window") or sum(LENGTHS)))
    return request.mask is not None and torch.equal(request.mask & SAME, causal & SAME)


class _Probe:
    """An attention implementation that notes what it is asked for. It has transformers make its masks."""

    def __init__(self) -> None:
        self.requests: dict[int, _Request] = {}
        """By module; one may ask more than once."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        has_values = attention_mask is not None and not attention_mask.is_meta
        mask = attention_mask[0, 0] if has_values else None
        self.requests[id(module)] = _Request(type(module).__name__, keywords, mask)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def mask(
        self, *, q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any
    ) -> Tensor | None:
        """bool[1, 1, q, kv] with values; None if it depends on more than positions."""
        one = torch.zeros((), dtype=torch.long)
        try:
            seen: Tensor = mask_function(
                one, one, torch.arange(q_length)[:, None], torch.arange(kv_length)[None, :]
            )
        except RuntimeError:
            return None
        return seen.expand(1, 1, q_length, kv_length)


def _without_memory(config: Any, text: Any, probe: _Probe) -> Any:
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(text, key, None):
            setattr(text, key, WINDOW)
    AttentionInterface.register(PROBE, probe.attention)
    AttentionMaskInterface.register(PROBE, probe.mask)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=PROBE, dtype=torch.bfloat16)


def _run(model: Any) -> None:
    """As the learner does it (`actors.learner_outputs`)."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to("meta")
    with _examples_are_known():
        model.train()(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)


@contextmanager
def _examples_are_known() -> Iterator[None]:
    """transformers reads from the positions which example a token is of, and these have no values."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: EXAMPLE[None]
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
