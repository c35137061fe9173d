"""The routes: models, chat completions, health, and the page."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..data.page import fill_page
from ..inference.sampling import Sampling
from ..inference.session import Session
from ..run.errors import DataError
from .answer import Choice, Vocabulary, Writer, fold
from .guard import Gone, to_response
from .protocol import ApiError, ChatRequest, bad_request, read_request
from .worker import Job, Reader, Worker

PAGE = Path(__file__).with_name("page.html")
REQUEST_SECONDS = 600
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # to many clients, and not to JSON
PAGE_MAY = "; connect-src 'self'"  # beside what pages of files may


@dataclass
class Service:
    """A session that is served, under one id for the tuned model and one for its base.

    Args:
        models: ids, with whether the adapter is used; the first is the default of the page.
        fingerprints: of the models, by id.
        most: answers that may run and wait at once.
    """

    session: Session
    models: dict[str, bool]
    fingerprints: dict[str, str]
    most: int
    worker: Worker = field(init=False)
    active: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.vocabulary = Vocabulary(self.session.tokenizer)
        self.reader = Reader()  # one: a tokenizer is changed while it is used

    def describe(self, model: str) -> dict[str, Any]:
        facts = {"id": model, "object": "model", "created": self.created, "owned_by": "luciole"}
        return facts | {"max_model_len": self.worker.room}

    def check_model(self, model: str) -> None:
        if model not in self.models:
            known = " and ".join(self.models)
            raise ApiError(404, f"there is no model {model[:80]!r} here, but {known}", "model", "model_not_found")

    def take_place(self, answers: int) -> None:
        """Count answers in, which `give_back` counts out. Raises ApiError when too many are there."""
        if self.active + answers > self.most:
            message = f"the server is busy: at most {self.most} answers run or wait; ask again soon"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after="2")
        self.active += answers

    def give_back(self, answers: int) -> None:
        self.active -= answers

    # From a request to a job

    def read(self, body: bytes) -> tuple[ChatRequest, Job]:
        """Read a body and write its prompt: what takes time, and no place in the event loop."""
        request, row = read_request(body)
        self.check_model(request.model)
        try:
            conversation = self.session.conversation(row["messages"], shown_tools(row.get("tools")))
            prompt = self.session.prompt(conversation)
            return request, self.make_job(request, conversation.tools, prompt)
        except DataError as error:
            raise bad_request(error) from None

    def make_job(self, request: ChatRequest, tools: Any, prompt: list[int]) -> Job:
        sampling = self.limit_calls(request, tools, self.sampling(request, len(prompt)))
        count = request.n or 1
        seeds = [None if request.seed is None else request.seed + i for i in range(count)]
        top = (request.top_logprobs or 0) if request.logprobs else None
        one_call = request.parallel_tool_calls is False
        return Job(
            prompt,
            [replace(sampling, seed=seed) for seed in seeds],
            [
                Writer(i, self.session.answer_stream(tools), self.vocabulary, request.stops, one_call, top)
                for i in range(count)
            ],
            self.models[request.model],
            time.monotonic() + REQUEST_SECONDS,
        )

    def sampling(self, request: ChatRequest, length: int) -> Sampling:
        """How the answers are drawn. Raises ApiError where the prompt and the answer have no room."""
        asked = request.max_completion_tokens or request.max_tokens
        room = self.worker.room
        if length + (asked or 1) > room:
            answer = f", and {asked:,} more are asked for" if asked else ""
            remedy = "ask for fewer" if asked and length < room else "shorten them"
            raise ApiError(
                400,
                f"the model has a context of {room:,} tokens; the messages have {length:,}{answer}; {remedy}",
                "messages" if remedy == "shorten them" else "max_tokens",
                "context_length_exceeded",
            )
        temperature = request.temperature
        if temperature is None:
            temperature = 1.0 if request.is_drawn else 0.0
        return Sampling(
            max_new_tokens=asked or room - length,
            temperature=temperature,
            top_p=request.top_p or 1.0,
            top_k=max(request.top_k or 0, 0),
            logprobs=max(request.top_logprobs or 1, 1) if request.logprobs else 0,
        )

    def limit_calls(self, request: ChatRequest, tools: Any, sampling: Sampling) -> Sampling:
        """The sampling for a tool_choice."""
        choice = request.tool_choice
        if choice in (None, "auto") or not request.tools:
            return sampling
        try:
            if choice == "none":
                return self.session.must_not_call(sampling, tools)
            names = [tool.function.name for tool in request.tools] if choice == "required" else [choice.function.name]
            return self.session.must_call(sampling, names, tools)
        except DataError as error:
            raise ApiError(400, f"tool_choice: {error}", "tool_choice") from None

    # Routes

    async def chat(self, request: Request) -> Response:
        places = 1
        self.take_place(1)
        try:
            asked, job = await self.reader.do(partial(self.read, await request.body()))
            self.take_place(len(job.writers) - 1)
            places = len(job.writers)
            job.when_over = partial(self.give_back, places)
            completion = Completion(asked, job, self.fingerprints[asked.model])
            self.worker.submit(job)
        except BaseException:
            self.give_back(places)
            raise

        def leave() -> None:
            self.worker.cancel(job)
            usage = job.usage
            told = f"{asked.model} {usage['prompt_tokens']}+{usage['completion_tokens']} tokens"
            request.state.notes.append(told)

        if asked.stream:
            return EventStream(completion.stream(), leave)
        try:
            return JSONResponse(await unless_gone(request, completion.whole()))
        finally:
            leave()

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.describe(model) for model in self.models]})

    async def show_model(self, request: Request) -> Response:
        self.check_model(request.path_params["model"])
        return JSONResponse(self.describe(request.path_params["model"]))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "active": self.active})

    async def page(self, request: Request) -> Response:
        html = fill_page(PAGE, {}, PAGE_MAY)  # without a key it tells nothing of what is served
        policy = re.search(r'"Content-Security-Policy" content="([^"]*)"', html)[1]
        return HTMLResponse(html, headers={"content-security-policy": f"{policy}; frame-ancestors 'none'"})

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.show_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
            Route("/", self.page),
        ]
        handlers = {HTTPException: unknown_route, ApiError: tell, Gone: nobody_hears, Exception: tell_of_bug}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app


@dataclass
class Completion:
    """The objects of one response."""

    request: ChatRequest
    job: Job
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def facts(self, kind: str) -> dict[str, Any]:
        facts = {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}
        return facts | {"system_fingerprint": self.fingerprint}

    async def choices(self) -> AsyncIterator[list[Choice]]:
        """What the job tells, as it comes: each time all that is there. Raises ApiError where it fails."""
        events, last = self.job.events, ()
        while last is not None:
            told = [await events.get(), *(events.get_nowait() for _ in range(events.qsize()))]
            last = told[-1]
            if found := [choice for choice in told if isinstance(choice, dict)]:
                yield found
            if isinstance(last, ApiError):
                raise last

    async def whole(self) -> dict[str, Any]:
        choices = fold([choice async for found in self.choices() for choice in found])
        return self.facts("chat.completion") | {"choices": choices, "usage": self.job.usage}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events. An error comes as one, and then nothing more."""
        facts = self.facts("chat.completion.chunk")
        options = self.request.stream_options
        tells_usage = bool(options and options.include_usage)
        blank = {"usage": None} if tells_usage else {}
        try:
            async for choices in self.choices():
                yield "".join(event(facts | {"choices": [choice]} | blank) for choice in choices)
        except ApiError as error:
            yield event(error.body)
            return
        if tells_usage:
            yield event(facts | {"choices": [], "usage": self.job.usage})
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. `leave` is called when they have ended, or the client has gone."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self.leave = leave

    async def __call__(self, *connection) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self.leave()


def event(value: dict) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(LINE_ENDS)}\n\n"


def shown_tools(tools: list[dict] | None) -> list[dict] | None:
    """Tools as training shows them: without `strict`, which asks for nothing where it is accepted."""
    if not tools:
        return None
    return [
        tool | {"function": {key: value for key, value in tool["function"].items() if key != "strict"}}
        for tool in tools
    ]


async def unless_gone(request: Request, work: Awaitable) -> Any:
    """The result of work, which is given up when the client goes. Raises Gone then."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watching), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, watching):
            one.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


async def tell(request: Request, error: ApiError) -> Response:
    return to_response(error)


async def nobody_hears(request: Request, error: Gone) -> Response:
    return Response(status_code=499)


async def tell_of_bug(request: Request, error: Exception) -> Response:
    """What the client reads of an error that is a mistake of ours, which Guard logs."""
    return to_response(ApiError(500, "a mistake of the server; its log says more"))


async def unknown_route(request: Request, error: HTTPException) -> Response:
    place = f"{request.method} {request.url.path[:80]}"
    message = f"there is no {place} here; ask GET /v1/models, POST /v1/chat/completions or GET /health"
    return to_response(ApiError(error.status_code, message, **error.headers or {}))
