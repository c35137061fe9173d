"""A server in a thread of the test, over an engine that writes what the test says."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from openai import OpenAI

from component.inference.sampling import Generation, Logprobs
from component.inference.session import Session
from component.serve.app import Service
from component.serve.guard import Guard
from component.serve.server import Server, bind

MODELS = {"tuned": True, "base": False}


class Script:
    """An engine that writes given answers, one token at each step; of each answer it remembers how it was asked.

    Attributes:
        answers: the tokens of the next ones, each ended by "stop"; the last one is written again and again.
        fault: raised by the next step.
        pause: seconds that a step takes.
    """

    room = 4000

    def __init__(self):
        self.answers, self.running, self.asked, self.cancelled = [[]], [], [], []
        self.fault, self.pause, self.steps = None, 0.0, 0

    def submit(self, prompt, sampling, adapted):
        generation = Generation(prompt, sampling, adapted)
        generation.script = list(self.answers[0] if len(self.answers) == 1 else self.answers.pop(0))
        self.running.append(generation)
        self.asked.append(generation)
        return generation

    def step(self):
        self.steps += 1
        time.sleep(self.pause)
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        for generation in [one for one in self.running if one.finish_reason is None]:
            if not generation.script:
                generation.finish_reason = "stop"
                continue
            generation.tokens.append(generation.script.pop(0))
            if generation.sampling.logprobs:
                generation.logprobs.append(Logprobs(-0.5, ((generation.tokens[-1], -0.5), (5, -1.5))))
            if len(generation.tokens) == generation.sampling.max_new_tokens:
                generation.finish_reason = "length"
        self.running = [one for one in self.running if one.finish_reason is None]

    def cancel(self, generation):
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"
            self.cancelled.append(generation)


class Running:
    """A server that answers at `url` until it is closed."""

    def __init__(self, session: Session, make_engine: Callable, models=MODELS, most=64, key="", host="127.0.0.1"):
        self.listening = bind("127.0.0.1", 0)
        self.port, self.key = self.listening.getsockname()[1], key
        self.url = f"http://127.0.0.1:{self.port}"
        self.service = Service(session, models, {model: f"fp_{model}" for model in models}, most)
        ready = threading.Event()
        self.server = Server(self.service, partial(Guard, host=host, key=key), ready.set)
        self.failure = None
        self.thread = threading.Thread(target=self.run, args=(make_engine,))
        self.thread.start()
        assert ready.wait(20)

    def run(self, make_engine) -> None:
        async def answer():
            self.loop = asyncio.get_running_loop()
            await self.server.answer(make_engine, self.listening)

        try:
            asyncio.run(answer())
        except Exception as failure:
            self.failure = failure

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=20)

    def chat(self, content="q", model="tuned", **fields):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=model, messages=messages, **fields)

    def send(self, path="/v1/chat/completions", body=None, headers=None, method=None):
        """(status, JSON or text, headers) of a plain request. A body that is no text is sent as JSON."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = ({} if body is None else {"Content-Type": "application/json"}) | (headers or {})
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        parsed = json.loads(text) if answer.headers["content-type"] == "application/json" else None
        return SimpleNamespace(status=answer.status, json=parsed, text=text, headers=answer.headers)

    def connect(self, text: bytes) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        made.sendall(text)
        return made

    def post(self, body: dict) -> socket.socket:
        """A connection on which a question was asked and nothing was read."""
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
        return self.connect(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)

    def stop(self, signum=signal.SIGTERM) -> None:
        self.loop.call_soon_threadsafe(self.server.stop, signum)

    def close(self) -> None:
        if self.thread.is_alive():
            if not self.server.received:
                self.stop(signal.SIGINT)
            self.thread.join(20)
        assert not self.thread.is_alive()


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def scripted_session(tiny_tokenizer) -> Session:
    return Session(tiny_tokenizer, "chatglm3")


@pytest.fixture(scope="module")
def shared_server(scripted_session):
    engine = Script()
    server = Running(scripted_session, lambda: engine)
    server.engine = engine
    yield server
    server.close()


@pytest.fixture
def server(shared_server):
    """A server that is shared by a module's tests, with a new script."""
    shared_server.engine.__init__()
    yield shared_server
    wait_until(lambda: shared_server.service.active == 0)


@pytest.fixture
def start(scripted_session):
    """Starts servers of a test's own."""
    made = []

    def run(engine: Script | None = None, session: Session | None = None, **options) -> Running:
        engine = engine or Script()
        made.append(Running(session or scripted_session, lambda: engine, **options))
        made[-1].engine = engine
        return made[-1]

    yield run
    for server in made:
        server.close()


@pytest.fixture
def write(tiny_tokenizer):
    """The tokens of ChatGLM3's messages, such as "\\n text" or "name\\n ```python…"."""

    def tokens(*messages: str) -> list[int]:
        ids = []
        for i, message in enumerate(messages):
            ids += [tiny_tokenizer.get_command("<|assistant|>")] * (i > 0) + tiny_tokenizer.tokenizer.encode(message)
        return ids

    return tokens
