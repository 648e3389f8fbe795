"""YAML files + `key=value` overrides -> `Config`, with errors that name the key and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from pipeline.core.config import EXSEARCH, Config
from pipeline.core.config.section import as_method
from pipeline.core.errors import UserError, suggestion
from pipeline.core.shipped import CONFIGS, HOME

RENAMED = {
    "warmup": "cold_start",
    "model.dtype": "rollout.dtype",
    "em.questions_per_shard": "rollout.questions_per_shard",
    "retriever.max_failure_share": "rollout.max_failure_share",
}
"""Keys of earlier versions, and what they are called now."""

Recipes = Mapping[str, Callable[[], type[BaseModel]]]
"""Name of a recipe -> what gives the model of its section, asked only where the recipe is chosen: it may be heavy."""


Files = Path | Sequence[Path] | None
"""YAML files of one configuration, key by key the later ones win; None or none: the defaults."""


def load_config(files: Files, overrides: Sequence[str] = (), *, recipes: Recipes | None = None) -> Config:
    """Read a configuration.

    Args:
        files: one YAML file, or several that make it up together.
        overrides: `section.key=value`, the value in YAML notation; later ones win.
        recipes: what may be chosen beside ExSearch. None: ExSearch alone.

    Raises:
        UserError: unreadable file, no such recipe, unknown key (with a suggestion), value of a wrong type, settings
            that do not fit.
    """
    paths = [files] if isinstance(files, Path) else list(files or ())
    trees = [read_tree(path) for path in paths]
    tree: dict[str, Any] = {}
    for of_file in trees:
        _merge(tree, _sections(of_file))
    for override in overrides:
        apply_override(tree, override)
    recipe = str(tree.get("recipe", EXSEARCH))
    model = _with_recipe(recipe, recipes)
    for key in (name for name in recipes or () if name in tree and name != recipe):
        raise UserError(
            f"the section {key} is of the recipe {key}, but the recipe is {recipe}; set recipe={key}, or remove it"
        )
    for path, of_file in zip(paths, trees, strict=True):
        with _said_of(path, several=len(paths) > 1):
            check_keys(of_file, model)
    check_keys(tree, model)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(describe(problem) for problem in error.errors())) from error


_MAX_BYTES = 2**20


def parse_yaml(text: str) -> Any:
    """What a text in YAML stands for.

    Raises:
        ValueError: it is not valid; says what is wrong.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deep to be read") from error


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a configuration file, as they stand there.

    Raises:
        UserError: there is none, or it holds something else.
    """
    if not path.is_file():
        shipped = HOME / path
        where = f"there is {shipped}" if shipped.is_file() else f"the shipped ones are in {CONFIGS}"
        raise UserError(f"no configuration file {path}; {where}")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes: that is no configuration")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (key: value), not a {type(tree).__name__}")
    return tree


def _sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without sections of which all keys are commented out; the short form of `weighting` in full."""
    given = {key: value for key, value in tree.items() if value is not None}
    return given | {"weighting": as_method(given["weighting"])} if "weighting" in given else given


def _merge(tree: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Put the values of a later file into a tree: sections key by key, everything else as a whole."""
    for key, value in later.items():
        if isinstance(value, Mapping):
            before = tree.get(key)
            tree[key] = dict(before) if isinstance(before, Mapping) else {}
            _merge(tree[key], value)
        else:
            tree[key] = value


@contextmanager
def _said_of(path: Path, *, several: bool) -> Iterator[None]:
    """Name the file in what is wrong with it, where there are others."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}" if several else str(error)) from error


def is_override(text: str) -> bool:
    """Whether this has the form of an override, `key.key=value`."""
    return re.match(r"\s*[a-z_]\w*(\.\w+)*\s*=", text) is not None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put `section.key=value`, the value in YAML notation, into a tree.

    Raises:
        UserError: it is not of this form, or goes below a single value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key=value, for example rollout.samples=8")
    try:
        value = parse_yaml(text) if text else ""
    except ValueError as error:
        raise UserError(f"override {override!r}: {text!r} is not valid YAML: {error}") from error
    if key.strip() == "weighting" and isinstance(value, str):
        key = "weighting.method"
    *sections, name = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        elif isinstance(child, str) and section == "weighting":
            child = node[section] = {"method": child}
        if not isinstance(child, dict):
            raise UserError(
                f"override {override!r}: {section} is a single value here, it has no keys below it"
            )
        node = child
    node[name] = value


def _with_recipe(recipe: str, recipes: Recipes | None) -> type[Config]:
    """`Config` with the section of a recipe."""
    if recipe == EXSEARCH:
        return Config
    if recipes is None:
        raise UserError(f"recipe: {recipe} is not known here; this command takes the recipe {EXSEARCH} only")
    if recipe not in recipes:
        known = [EXSEARCH, *recipes]
        raise UserError(f"there is no recipe {recipe}{suggestion(recipe, known)}")
    settings = recipes[recipe]()
    return create_model("Config", __base__=Config, **{recipe: (settings, settings())})  # type: ignore[call-overload,no-any-return]


def check_keys(tree: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    """Refuse unknown keys with the nearest known one. Pydantic refuses them too, but cannot suggest.

    Raises:
        UserError: with the new name where the key had it in an earlier version.
    """
    for key, value in tree.items():
        if (renamed := RENAMED.get(f"{prefix}{key}")) is not None:
            raise UserError(f"the configuration key {prefix}{key} is called {renamed} now")
        if key not in model.model_fields:
            raise UserError(f"unknown configuration key {prefix}{key}{_suggestion(str(key), model, prefix)}")
        section = section_of(model.model_fields[key])
        if section is not None and isinstance(value, Mapping):
            check_keys(value, section, f"{prefix}{key}.")


def _suggestion(key: str, model: type[BaseModel], prefix: str) -> str:
    elsewhere = [name for name in all_keys(Config) if name.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    initials = [name for name in model.model_fields if key == "".join(word[0] for word in name.split("_"))]
    near = initials or difflib.get_close_matches(key, model.model_fields, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known here: {', '.join(sorted(model.model_fields))}"


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        keys += all_keys(section, f"{prefix}{name}.") if section is not None else [f"{prefix}{name}"]
    return keys


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, also where it may be null."""
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def describe(problem: Any) -> str:
    """One of pydantic's errors as a sentence about a key."""
    key = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    given = "" if isinstance(problem["input"], Mapping) else f", not {problem['input']!r}"
    return f"configuration key {key}: {message[0].lower()}{message[1:]}{given}"
