"""A model out of a run, with everything that is needed to ask it, serve it or publish it."""

from __future__ import annotations

import shutil
from pathlib import Path

from actors.learner_files import replace_directory
from pipeline.core.agent_settings import AGENT_FILE, agent_settings
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.model_card import CARD_FILE, Exported, model_card
from pipeline.core.models import CHECKSUMS, check_export
from pipeline.core.report import best_iteration, models_of
from pipeline.core.run import RunFiles, read_json, write_atomically, write_json
from pipeline.methods import load

BEST = "best"


def export_model(
    run: Path, out: Path, iteration: str, policy: str | None, push: str | None, public: bool, display: Display
) -> None:
    """Copy a model to a folder of its own, with `agent.json` and a card, and put it on the hub.

    Args:
        out: new, or an empty folder.
        iteration: a number, or `best`: the one that dev questions chose.
        policy: of which the model is; None where the run trains only one.
        push: the hub's NAMESPACE/NAME, or None.
        public: whether a repository that is new there is for everybody.

    Raises:
        UserError: no such run or model, it is damaged, or `out` holds something.
        RunError: the hub does not take it; what was written stays.
    """
    files = RunFiles(run)
    files.check_is_run()
    config = load(run / "config.yaml")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; name a new folder")
    if push is not None and push.count("/") != 1:
        raise UserError(f"--push {push}: give NAMESPACE/NAME, as the hub has it")
    best = best_iteration(files, config.of_recipe)
    number = best if iteration == BEST else _number(iteration)
    name, model = _chosen(files, config, number, policy)
    if (model / "modules.json").is_file() and not (model / CHECKSUMS).is_file():
        raise UserError(
            f"{model} is a sentence encoder and needs nothing beside it: copy the directory, or push it with: "
            f"hf upload NAMESPACE/NAME {model}"
        )
    check_export(model)
    answers = name == SEARCHER
    exported = Exported(push.split("/")[1] if push else out.name, name, number, best, answers)
    card = model_card(exported, config, read_json(run / "report.json") or {})

    def write(directory: Path) -> None:
        shutil.copytree(model, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKSUMS))
        if answers:
            write_json(directory / AGENT_FILE, agent_settings(config))
        write_atomically(directory / CARD_FILE, card)

    with display.status(f"copying {model.relative_to(files.path)}"):
        if out.exists():
            out.rmdir()
        replace_directory(out, write)
    display.line(f"written: {out}")
    if push is not None:
        with display.status(f"pushing to {push}"):
            address = _push(out, push, public)
        display.line(f"pushed: {address}")


def _number(iteration: str) -> int:
    if not iteration.isdecimal():
        raise UserError(f"--iteration {iteration}: give the number of an iteration, or {BEST}")
    return int(iteration)


def _chosen(files: RunFiles, config: Config, number: int, policy: str | None) -> tuple[str, Path]:
    """The policy and its model directory after an iteration."""
    trained = files.trained()
    if not trained:
        raise UserError(
            f"{files.path} has trained no model yet; go on with it, or use what it started from ({config.model.path})"
        )
    if policy is None:
        if len(trained) > 1:
            raise UserError(f"{files.path} trains {' and '.join(trained)}; say which one with --policy")
    elif policy not in trained:
        known = f"there {'are' if len(trained) > 1 else 'is'} {', '.join(trained)}"
        raise UserError(f"--policy {policy}: the run has trained no such policy; {known}")
    name = policy or next(iter(trained))
    made = [t for t in files.versions(name) if files.at(f"{t}/{name}/model").is_dir()]
    models = models_of(files, number)
    if (model := models.get(name)) is None:
        raise UserError(
            f"after iteration {number} the {name} of {files.path} is what it started from ({config.model.path}); "
            f"with a model are {_list(made)}"
        )
    if number not in files.versions(name):
        raise UserError(f"iteration {number} of {files.path} is not trained; with a model are {_list(made)}")
    if not model.is_dir():
        raise UserError(
            f"the model of iteration {number} did not stay (storage.keep_last); with a model are {_list(made)}"
        )
    return name, model


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _push(folder: Path, name: str, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model, settings, card")
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise RunError(
            f"{name} was not pushed: {error!s:.300}. The folder {folder} stands; push it with: hf upload {name} "
            f"{folder}"
        ) from error
