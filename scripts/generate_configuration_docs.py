"""Write `docs/configuration.md` from the typed configuration (`pipeline.core.config`).

    python scripts/generate_configuration_docs.py            write the page
    python scripts/generate_configuration_docs.py --check    exit with 1 if the page is out of date

Everything on the page is read from the code: keys, types, ranges, defaults and their documentation from the model,
the rules between keys from the messages that breaking them gives, the keys that a resumed run may change from
`pipeline.core.run`. The same code gives the same page, byte for byte.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.core.config import Config
from pipeline.core.config.loading import load_config, section_of
from pipeline.core.errors import UserError
from pipeline.core.run import FREE_TO_CHANGE
from pipeline.methods import names, settings_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

Every key of a run, by section. A configuration is a YAML file of sections (`--config FILE`), or several of
them that make it up, then `key=value` overrides on the command line; later ones win, key by key. Values are in
YAML notation: `data.train=[a.jsonl,b.jsonl]`, `learner.lora=null`. A key that is not listed here is refused,
with the nearest one that exists. What a run really used is in its `config.yaml`; `exsearch config` prints it
without running anything. Ready files are in [configs/](../configs). [formats.md](formats.md) describes the
files that the `data` section names, [clusters.md](clusters.md) what the cluster settings mean.

The page is made by `scripts/generate_configuration_docs.py`: change `pipeline/core/config` or the recipe
that a section is named after, not the page."""

BROKEN_RULES: tuple[tuple[str, ...], ...] = (
    ("weighting=posterior", "rollout.samples=1"),
    ("weighting=length_normalised", "weighting.self_normalised=true", "rollout.samples=1"),
    ("weighting=likelihood", "weighting.floor=0.1"),
    ("weighting=likelihood", "weighting.self_normalised=true"),
    ("weighting=uniform", "weighting.credit=turn"),
    ("weighting.subtract_baseline=true", "agent.think=false"),
    ("weighting.credit_decay=0.5",),
    ("weighting.reward=em",),
    ("weighting.max_ratio=4",),
    ("rollout.samples=4", "em.hinted=4", "weighting.correct_proposal=true"),
    ("em.hinted=1",),
    ("learner.tokens_per_microbatch=2048", "model.max_length=4096"),
    ("learner.offload_parameters=true", "learner.zero_stage=2"),
    ("learner.offload_optimizer=true", "learner.zero_stage=0"),
    ("retriever.url=http://127.0.0.1:8000", "retriever.replicas=2"),
    ("retriever.dialect=search-r1",),
    ("agent.tags.think=[<a>,</a>]", "agent.tags.record=[<a>,</a>]"),
    ("agent.select=true", "agent.search=false"),
)
"""Overrides of the defaults, each set of which breaks one rule between keys."""


def render() -> str:
    """The whole page."""
    sections = {name: model for name, field in Config.model_fields.items() if (model := section_of(field))}
    top = {name: field for name, field in Config.model_fields.items() if name not in sections}
    parts = [INTRODUCTION, "## Top level", _table(top.items(), "")]
    for name, model in sections.items():
        parts += _section(name, model, level=2)
    for recipe in names():
        parts += _section(recipe, settings_of(recipe), level=2)
    parts += _rules() + _free_to_change()
    return "\n\n".join(parts) + "\n"


def type_text(field: FieldInfo) -> str:
    """Type and range of a field in words: `whole number, >= 1, or null`."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    members = get_args(field.annotation) if is_union else (field.annotation,)
    bounds = [_bound(item) for item in field.metadata if isinstance(item, Ge | Gt | Le | Lt)]
    names = [_type(member) for member in members if member is not NoneType]
    is_list = any(get_origin(member) is tuple for member in members)
    if is_list and any(isinstance(item, BeforeValidator) for item in field.metadata):
        names.append("one text")
    text = ", ".join([" or ".join(names), *bounds])
    if NoneType not in members:
        return text
    return f"{text}, or null" if bounds else f"{text} or null"


def default_text(value: Any) -> str:
    """A default in YAML notation; "required" where there is none."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    return value.isoformat() if isinstance(value, datetime.date) else json.dumps(value)


def _section(name: str, model: type[BaseModel], level: int) -> list[str]:
    parts = [f"{'#' * level} {name}"]
    if doc := model.__dict__.get("__doc__"):
        parts.append(" ".join(doc.split()))
    inner = {key: section for key, field in model.model_fields.items() if (section := section_of(field))}
    keys = [(k, field) for k, field in model.model_fields.items() if k not in inner or _is_optional(field)]
    parts.append(_table(keys, f"{name}."))
    for key, section in inner.items():
        parts += _section(f"{name}.{key}", section, level + 1)
    return parts


def _table(fields: Iterable[tuple[str, FieldInfo]], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        if not field.description:
            raise SystemExit(
                f"{prefix}{name} has no line of documentation under it in pipeline/core/config.py"
            )
        meaning = " ".join(field.description.split())
        cells = (f"`{prefix}{name}`", type_text(field), f"`{default_text(field.default)}`", meaning)
        rows.append(_row(*cells))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _is_optional(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def _bound(constraint: Ge | Gt | Le | Lt) -> str:
    match constraint:
        case Ge(ge=value):
            return f">= {value}"
        case Gt(gt=value):
            return f"> {value}"
        case Le(le=value):
            return f"<= {value}"
        case Lt(lt=value):
            return f"< {value}"


def _type(annotation: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", datetime.date: "date"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_plural(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    raise SystemExit(f"no words for the type {annotation!r}; add them to this script")


def _plural(annotation: Any) -> str:
    return {str: "texts", float: "numbers", int: "whole numbers"}[annotation]


def _rules() -> list[str]:
    """What the settings may not say together, in the words of the error messages."""
    rows = ["| settings | what the program says |", "|---|---|"]
    for overrides in BROKEN_RULES:
        rows.append(_row(" ".join(f"`{override}`" for override in overrides), _refusal(overrides)))
    text = "These are refused before anything starts. The other keys have their defaults in each example."
    return ["## Rules between keys", text, "\n".join(rows)]


def _refusal(overrides: Sequence[str]) -> str:
    try:
        load_config(None, overrides)
    except UserError as error:
        return " ".join(str(error).split())
    raise SystemExit(f"{' '.join(overrides)} is accepted; BROKEN_RULES is out of date")


def _free_to_change() -> list[str]:
    text = (
        "A run that is started again must compute the same thing: another value of any key is refused, with "
        "a list of what differs. Only these say where or how long a run goes, not what it computes, and may "
        "change:"
    )
    names = [f"`{key}.*`" if _is_section(key) else f"`{key}`" for key in FREE_TO_CHANGE]
    names.append("`iterations` and `patience` in the section of another recipe")
    return ["## Keys that a resumed run may change", text, "\n".join(f"- {name}" for name in names)]


def _is_section(key: str) -> bool:
    return key in Config.model_fields and section_of(Config.model_fields[key]) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md from pipeline/core/config.py.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is out of date")
    page = render()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE} is out of date; run python scripts/generate_configuration_docs.py")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
