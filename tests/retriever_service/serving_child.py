"""A server of a real index, with a hashing encoder in place of a model.

python -m tests.retriever_service.serving_child INDEX '{"port": 0, ...}'    (settings as JSON)
"""

from __future__ import annotations

import json
import sys

from retriever_service.search.engine import SearchEngine
from retriever_service.service.server import ServerSettings, serve
from tests.retriever_service.support import load_hash_encoder


def main() -> None:
    index, settings = sys.argv[1:]
    serve(
        ServerSettings(**json.loads(settings)),
        lambda: SearchEngine.open(index, load_encoder=load_hash_encoder),
        on_listening=lambda url: print(url, flush=True),
    )


if __name__ == "__main__":
    main()
