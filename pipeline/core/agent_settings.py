"""`agent.json` beside a model: how it was trained to search, so that nobody has to say it again.

It is a configuration file of a few sections, and is read as one (`exsearch ask --model DIR` takes it by itself).
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.models import check_model, local_snapshot
from pipeline.core.run import Json

AGENT_FILE = "agent.json"


def agent_settings(config: Config) -> Json:
    """The sections: `agent` as a whole, of `model` the longest context, of `retriever` the method that the sub-queries
    were made for. Where the retriever is, is not the model's."""
    tree = config.model_dump(mode="json")
    return {
        "model": {"max_length": tree["model"]["max_length"]},
        "agent": tree["agent"],
        "retriever": {"method": tree["retriever"]["method"]},
    }


def settings_beside(model: str) -> Path | None:
    """The file of a model directory, or of a hub name that is on this machine; None without one.

    Raises:
        UserError: neither a directory nor a hub name, or one that is not here as a whole while the hub is out of reach.
    """
    if not Path(model).is_dir():
        check_model(model)
    directory = local_snapshot(model)
    file = directory / AGENT_FILE if directory is not None else None
    return file if file is not None and file.is_file() else None
