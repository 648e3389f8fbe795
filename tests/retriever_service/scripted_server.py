"""A retrieval server in a thread that follows a script."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from retriever_service.service.batching import Answers
from retriever_service.service.wire import retrieve_reply, search_reply
from tests.retriever_service.fake_engine import FakeEngine


class ScriptedServer:
    """Answers as a server of either dialect, unless `script` has something else: a status, (status, headers, body) or
    "hang" or "trickle", one per request. Records requests and connections."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[tuple[str, Any, str | None]] = []
        self.connections: set[Any] = set()
        self.over = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        action = self.script.pop(0) if self.script else 200
        self.pause_s = 0.1 if action == "trickle" else 0.0
        if action == "trickle":
            action = (200, {}, b" " * 100)
        if action == "hang":
            self.over.wait(timeout=30)
            action = 200
        if action != 200:
            return action if isinstance(action, tuple) else (action, {}, b'{"detail": "as scripted"}')
        if path == "/info":
            return 200, {}, json.dumps({"index": FakeEngine().fingerprint}).encode()
        answers = Answers(
            tuple(map(tuple, FakeEngine().search(body["queries"], body.get("k") or body["topk"]))), "f"
        )
        reply: Any = (
            search_reply(answers)
            if path == "/search"
            else retrieve_reply(answers, return_scores=body["return_scores"])
        )
        return 200, {}, json.dumps(reply).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(body)

            def do_GET(self) -> None:
                self._answer(None)

            def _answer(self, body: Any) -> None:
                server.requests.append((self.path, body, self.headers["Authorization"]))
                server.connections.add(self.client_address)
                status, headers, content = server.reply(self.path, body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not server.pause_s:
                    self.wfile.write(content)
                    return
                with suppress(OSError):  # whoever asked has gone
                    for byte in content:
                        server.over.wait(server.pause_s)
                        self.wfile.write(bytes([byte]))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
