"""What a user's own module holds, found by the name that a key of the configuration gives it: `module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.core.errors import UserError


def of_own_module(where: str, name: str, what: str, example: str) -> Any:
    """What the module has under the name; None if it has nothing.

    Args:
        where: the key and its value, for messages.
        what: a word for what is looked for.

    Raises:
        UserError: not such a name, or the module cannot be imported.
    """
    module, colon, inside = name.partition(":")
    if not (module and colon and inside):
        raise UserError(f"{where} must be a module and a {what}, as in {example}")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"{where} cannot be imported ({error!r}); put the folder of its file on PYTHONPATH, on every node"
        ) from error
    return getattr(found, inside, None)
