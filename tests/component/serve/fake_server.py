"""A small server of OpenAI's protocol with answers that a test writes, for tests of the page."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TUNED, BASE = "firefly-tuned", "firefly-base"


def words(text: str, kind: str = "content") -> list[dict]:
    """Deltas of a text, character by character."""
    return [{kind: character} for character in text]


def call(index: int, name: str, arguments: str) -> list[dict]:
    """Deltas of a call: its id and name, then its arguments in two parts."""
    begin = {"index": index, "id": f"call-{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    parts = [{"index": index, "function": {"arguments": part}} for part in (arguments[:5], arguments[5:])]
    return [{"tool_calls": [part]} for part in (begin, *parts)]


class FakeServer(ThreadingHTTPServer):
    """Serves a page at /, and as answers what `answer` yields for a request: deltas, or anything else as an event.

    An answer that is a tuple (status, headers, body) is an error.

    Attributes:
        models: ids.
        room: tokens that a conversation may have.
        key: what requests must bring, if it is not empty.
        requests: bodies of the requests for answers.
        left: set when a client has left an answer before its end.
    """

    daemon_threads = True

    def __init__(self, page: Callable[[], str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.page, self.models, self.key, self.room = page, [TUNED, BASE], "", 8192
        self.requests: list[dict] = []
        self.left = threading.Event()
        self.answer: Callable[[dict], Any] = lambda request: words("hello")
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int, text: str, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def is_let_in(self) -> bool:
        if not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.reply(401, json.dumps({"error": {"message": "wrong key", "type": "invalid_request_error"}}))
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, self.server.page(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and self.is_let_in():
            facts = {"object": "model", "max_model_len": self.server.room}
            models = [{"id": model} | facts for model in self.server.models]
            self.reply(200, json.dumps({"object": "list", "data": models}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_let_in():
            return
        request = json.loads(body)
        self.server.requests.append(request)
        answer = self.server.answer(request)
        if isinstance(answer, tuple):
            status, headers, text = answer
            self.reply(status, text, **headers)
            return
        self.reply(200, "", "text/event-stream")
        try:
            for event in events(answer):
                self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
        except OSError:
            self.server.left.set()


def events(answer: Iterator | list) -> Iterator[Any]:
    """Chunks of an answer with an end where it has none of its own: finish_reason, usage and [DONE]."""
    called, count = False, 0
    for part in answer:
        if not isinstance(part, dict) or part.keys() & {"choices", "error"}:
            yield part
            continue
        called, count = called or "tool_calls" in part, count + 1
        yield {"choices": [{"index": 0, "delta": part, "finish_reason": None}]}
    if not isinstance(answer, list):
        return
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if called else "stop"}]}
    yield {"choices": [], "usage": {"prompt_tokens": 1234, "completion_tokens": count}}
    yield "[DONE]"
