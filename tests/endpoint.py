"""A real HTTP server that speaks as much of OpenAI's protocol as a judge needs, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with a request.

    Attributes:
        says: content of a proper answer.
        status: of the response.
        headers: further ones.
        body: the bytes to send in place of a proper answer.
        after_s: seconds to wait before.
        drops: whether to close the connection without a word.
    """

    says: str = "A"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    after_s: float = 0.0
    drops: bool = False


@dataclass
class Endpoint:
    """The server's address, what it does, and what it has seen."""

    url: str = ""
    script: Callable[[str, int], Reply] = lambda question, times: Reply()
    questions: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = request["messages"][-1]["content"]
        with self._lock:
            times = Counter(self.questions)[question]
            self.questions.append(question)
            self.requests.append({"path": handler.path, **request})
            self.keys.append(handler.headers.get("Authorization"))
            self.at.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._send(handler, self.script(question, times))
        finally:
            with self._lock:
                self._now -= 1

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        time.sleep(reply.after_s)
        if reply.drops:
            handler.close_connection = True
            return
        message = {"role": "assistant", "content": reply.says}
        proper = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
        }
        body = json.dumps(proper).encode() if reply.body is None else reply.body
        handler.send_response(reply.status)
        for name, value in (("Content-Type", "application/json"), *reply.headers):
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint on this machine, for as long as the block runs."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client may have stopped waiting
                endpoint.reply(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
