"""`agent.json` beside a model: how it was trained to search, so that nobody has to say it again.

It is a configuration file of a few sections, and is read as one (`exsearch ask --model DIR` takes it by itself).
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.models import local_snapshot
from pipeline.core.run import Json

AGENT_FILE = "agent.json"
_RETRIEVER = ("method",)
"""What of the retriever the model's sub-queries were made for. Where it is, is not the model's."""


def agent_settings(config: Config) -> Json:
    """The sections: `agent` as a whole, of `model` the longest context, of `retriever` the method."""
    tree = config.model_dump(mode="json")
    return {
        "model": {"max_length": tree["model"]["max_length"]},
        "agent": tree["agent"],
        "retriever": {key: tree["retriever"][key] for key in _RETRIEVER},
    }


def settings_beside(model: str) -> Path | None:
    """The file of a model directory, or of a hub name that is on this machine; None without one.

    Raises:
        UserError: a hub name whose snapshot is not whole, and the hub is out of reach.
    """
    directory = Path(model) if Path(model).is_dir() else _of_hub(model)
    file = directory / AGENT_FILE if directory is not None else None
    return file if file is not None and file.is_file() else None


def _of_hub(name: str) -> Path | None:
    return local_snapshot(name) if name.count("/") == 1 and not Path(name).exists() else None
