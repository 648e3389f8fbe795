"""The data sets that can be fetched: where they are on the hub, what their own files are called, their licences.

The hub's layouts are those that its public pages and other people's code describe; the tests have a small copy of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.core.data.split_names import Split


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set. Splits without answers (the hidden test sets) are not named."""

    name: str
    hub: str
    """Repository on the hub, and behind a colon its configuration."""
    hub_splits: Mapping[Split, str]
    """What the hub calls them."""
    own_files: Mapping[Split, str]
    """Patterns of the names that the authors gave to their files."""
    licence: str
    url: str
    note: str = ""
    other_files: Mapping[str, str] = field(default_factory=dict)
    """Further files of the authors, by what they are."""

    def patterns(self, split: Split) -> list[str]:
        """Where a local copy may have a split, the likeliest first."""
        hub = self.hub_splits.get(split)
        config = self.hub.partition(":")[2]
        return [
            *([self.own_files[split], f"**/{self.own_files[split]}"] if split in self.own_files else []),
            f"{split}.jsonl*",
            *([f"{config}/{hub}-*.parquet"] if hub and config else []),
            *([f"**/{hub}-*.parquet", f"**/{hub}.parquet", f"**/{hub}/dataset_info.json"] if hub else []),
            *([f"{hub}.jsonl*", f"{hub}.json*", f"{hub}.tsv", f"{hub}.csv"] if hub else []),
            f"{split}.json",
        ]


_TRAIN_DEV: Mapping[Split, str] = {"train": "train", "dev": "validation"}
_TEST: Mapping[Split, str] = {"test": "test"}

DATA_SETS: Mapping[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "hotpotqa",
            "hotpotqa/hotpot_qa:distractor",
            _TRAIN_DEV,
            {"train": "hotpot_train_v*.json*", "dev": "hotpot_dev_distractor_v*.json*"},
            "CC BY-SA 4.0",
            "https://hotpotqa.github.io",
        ),
        DataSet(
            "2wikimultihopqa",
            "framolfese/2WikiMultihopQA",
            _TRAIN_DEV,
            {"train": "train.json", "dev": "dev.json"},
            "Apache-2.0",
            "https://github.com/Alab-NII/2wikimultihop",
            other_files={"aliases": "id_aliases.json"},
        ),
        DataSet(
            "musique",
            "dgslibisey/MuSiQue",
            _TRAIN_DEV,
            {"train": "musique_ans_v*_train.jsonl", "dev": "musique_ans_v*_dev.jsonl"},
            "CC BY 4.0",
            "https://github.com/StonyBrookNLP/musique",
        ),
        DataSet(
            "nq",
            "google-research-datasets/nq_open",
            _TRAIN_DEV,
            {"train": "NQ-open.train.jsonl", "dev": "NQ-open.dev.jsonl"},
            "CC BY-SA 3.0",
            "https://github.com/google-research-datasets/natural-questions",
            "The questions alone: bring a Wikipedia.",
        ),
        DataSet(
            "triviaqa",
            "mandarjoshi/trivia_qa:unfiltered.nocontext",
            _TRAIN_DEV,
            {"train": "unfiltered-web-train.json", "dev": "unfiltered-web-dev.json"},
            "not stated: the authors do not own the questions and documents",
            "https://nlp.cs.washington.edu/triviaqa",
            "The questions alone: bring a Wikipedia.",
        ),
        DataSet(
            "popqa",
            "akariasai/PopQA",
            _TEST,
            {"test": "popQA.tsv"},
            "MIT",
            "https://github.com/AlexTMallen/adaptive-retrieval",
            "The questions alone: bring a Wikipedia.",
        ),
        DataSet(
            "bamboogle",
            "chiayewken/bamboogle",
            _TEST,
            {"test": "Bamboogle*.csv"},
            "MIT",
            "https://github.com/ofirpress/self-ask",
            "The questions alone: bring a Wikipedia.",
        ),
    )
}
