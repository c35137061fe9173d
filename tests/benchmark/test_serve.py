"""The benchmark of a server, asked of a small one that answers as OpenAI's protocol does."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from benchmark import serve

EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [{"delta": {}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}},
]


@pytest.fixture
def server():
    """A server with one model; `asked` are the requests of answers, `status` is what it answers them with."""

    class Handler(BaseHTTPRequestHandler):
        asked, status = [], 200

        def do_GET(self):
            self.tell(200, b'{"data": [{"id": "first"}]}' if self.path == "/v1/models" else b"{}")

        def do_POST(self):
            self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            events = "".join(f"data: {json.dumps(event)}\n\n" for event in EVENTS) + "data: [DONE]\n\n"
            self.tell(self.status, events.encode() if self.status == 200 else b'{"error": {"message": "busy"}}')

        def tell(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        Handler.port = running.server_port
        yield Handler
        running.shutdown()


def run(monkeypatch, server, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", str(server.port), "--prompt", "9", *arguments])
    serve.main()


def test_each_row_counts_the_tokens_that_the_server_tells(monkeypatch, server, capsys, tmp_path):
    run(monkeypatch, server, "--streams", "1,3", "--new", "6", "--json", str(tmp_path / "figures.json"))
    one, three = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["model"], row["streams"], row["prompt"], row["answer"]) for row in (one, three)] == [
        ("first", 1, 7.0, 5.0),
        ("first", 3, 7.0, 5.0),
    ]
    assert len(three["first"]) == 3 and min(three["first"]) > 0
    assert f"| {three['speed']:,.0f} " in capsys.readouterr().out
    assert [asked["max_tokens"] for asked in server.asked] == [8, 6] + [8] * 3 + [6] * 3
    questions = [asked["messages"][0]["content"] for asked in server.asked]
    assert {len(question) for question in questions} == {9} and len(set(questions)) == 8


def test_a_refusal_ends_it_with_the_servers_words(monkeypatch, server):
    server.status = 429
    with pytest.raises(SystemExit, match=r'127.0.0.1:\d+: 429 .*"busy"'):
        run(monkeypatch, server, "--streams", "1")


def test_a_percentile_is_one_of_the_values():
    assert [serve.percentile([3.0, 1.0, 2.0, 4.0], share) for share in (1, 25, 50, 99)] == [1.0, 1.0, 2.0, 4.0]
