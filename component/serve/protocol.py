"""What a request of OpenAI's chat API may hold, and errors in its shape. Whatever cannot be done is refused by name."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from ..data.conversation import describe
from ..data.reader import load_json
from ..run.errors import DataError

MESSAGES, PARTS, CALLS, TOOLS, ANSWERS, STOPS, TOP = 2000, 2000, 128, 128, 16, 4, 20  # how many a request may have
CHARACTERS = 2**19  # of JSON of all tools, and of all messages of the assistant: what is parsed once more
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that is told to the client.

    Args:
        param: the field that it is about.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad_request(error: DataError) -> ApiError:
    """The error for what training would refuse, whose text begins with the field."""
    message = str(error)
    place = message.split(":")[0].split(" ")[0]
    if place.endswith(".arguments"):
        message += "; mend it, or leave out this answer and the results of its calls"
    return ApiError(400, message, place if place.startswith(("messages", "tools", "tool_choice")) else "messages")


# Fields that are accepted where they change nothing: those values, and what to do instead of any other.
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "frequency_penalty": ((0,), "leave it out, or lower temperature and top_p"),
    "presence_penalty": ((0,), "leave it out, or lower temperature and top_p"),
    "repetition_penalty": ((1,), "leave it out, or lower temperature and top_p"),
    "min_p": ((0,), "use top_p or top_k"),
    "logit_bias": (({},), "leave it out"),
    "response_format": (({"type": "text"},), "ask for the form in a message, or for a call of a function"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "audio": ((), "ask for text"),
    "modalities": ((["text"],), "ask for text"),
    "prediction": ((), "leave it out"),
    "web_search_options": (({},), "offer a function that searches, in tools"),
    "reasoning_effort": ((), "leave it out; the model reasons as it was trained to"),
    "chat_template": ((), "leave it out; prompts are those of training"),
    "chat_template_kwargs": (({},), "leave it out; prompts are those of training"),
    "verbosity": (("medium",), "leave it out"),
    "store": ((False,), "leave it out; nothing is stored"),
    "service_tier": (("auto", "default"), "leave it out"),
    "best_of": ((1,), "use n"),
    "echo": ((False,), "leave it out"),
}


def otherwise(words: str) -> WrapValidator:
    """Validation whose refusal is told in these words."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(words) from None

    return WrapValidator(check)


class Strict(BaseModel):
    """An object of known fields. Of many unknown ones the first is told, as each error takes its time to make."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def has_not_more_fields_than_are_known(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = next(name for name in value if name not in cls.model_fields)
            raise PydanticCustomError("extra_forbidden", "not known", {"unknown": (unknown,)})
        return value


class TextPart(Strict):
    type: Annotated[Literal["text"], otherwise("parts of text alone are read, no pictures, sound or files")]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of the delta that it was folded from


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What official clients write into an answer that they send back.
    refusal: None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def has_only_what_its_role_says(self) -> "Message":
        for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                raise ValueError(f"{field} belongs to a message of the role {role}, and this one's is {self.role}")
        if self.name and self.role != "tool":
            raise ValueError("name has no place in the model's prompt; write it into content, or leave it out")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id is missing; give the id of the call that this result answers")
        return self


class FunctionTool(BaseModel):
    """A function. It is shown to the model as it was written, with whatever else it holds."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[
        str,
        StringConstraints(min_length=1, max_length=128, pattern=r"^\S+$"),
        otherwise("a function's name has 1 to 128 characters and no white space"),
    ]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[
        Literal[False] | None,
        otherwise("arguments are not held to a schema; leave strict out (OpenAI's agents SDK: strict_mode=False)"),
    ] = None


class Tool(Strict):
    type: Annotated[Literal["function"], otherwise("functions alone can be offered")]
    function: FunctionTool


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Annotated[Literal["function"], otherwise("none, auto, required or one function can be chosen")]
    function: NamedFunction


Stop = Annotated[str, Field(min_length=1, max_length=500)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions.

    Without a temperature the answer is the most probable one, as the figures of script/score.py are; a request that
    asks for draws by top_p, top_k, seed or n has OpenAI's temperature, 1.
    """

    model: str
    messages: Annotated[list[Message], Field(max_length=MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # of vLLM; -1 and 0: all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=ANSWERS)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS, fail_fast=True)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    # They change nothing.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def agrees_with_itself(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        if not self.messages:
            raise ValueError("messages is empty; give a question")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream true")
        names = [tool.function.name for tool in self.tools or ()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"tools has the function {twice[0]!r} twice; give each its own name")
        self.check_results()
        if self.tool_choice not in (None, "none", "auto"):
            if not names:
                raise ValueError("tool_choice asks for a call, and tools offers no function")
            if not isinstance(self.tool_choice, str) and self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is none of {', '.join(names)}")
        return self

    def check_results(self) -> None:
        """Raise ValueError where a result names another function than the call that it answers."""
        called: dict[str, str] = {}
        for i, message in enumerate(self.messages):
            called |= {call.id: call.function.name for call in message.tool_calls or ()}
            name = called.get(message.tool_call_id or "")
            if message.name and name and message.name != name:
                raise ValueError(f"messages[{i}].name is {message.name!r}, and the call is one of {name!r}")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_drawn(self) -> bool:
        asked = self.top_k not in (None, -1, 0) or self.seed is not None or (self.n or 1) > 1
        return asked or self.top_p not in (None, 1)


FIELDS = {name for kind in (ChatRequest, Message, TextPart, ToolCall, CalledFunction, Tool, FunctionTool, NamedChoice,
                            NamedFunction, StreamOptions) for name in kind.model_fields}  # fmt: skip


def read_request(body: bytes) -> tuple[ChatRequest, dict[str, Any]]:
    """Read a request strictly.

    Returns:
        (the request, its JSON, whose messages and tools are as they were written).

    Raises:
        ApiError: naming the first field that is wrong, unknown or not supported.
    """
    try:
        row = load_json(body.decode("utf-8"))
    except (DataError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise ApiError(400, f"the body must be an object with model and messages, got {describe(row)}")
    for name, (neutral, remedy) in UNSUPPORTED.items():
        value = row.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported: {remedy}", name, "unsupported_parameter")
    try:
        request = ChatRequest.model_validate(row)
    except ValidationError as error:
        raise refusal(error) from None
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    for name, what, parsed in (("tools", "", row.get("tools")), ("messages", " of the assistant", answers)):
        if (length := len(json.dumps(parsed, ensure_ascii=False))) > CHARACTERS:
            reason = f"{name}{what}: {length:,} characters of JSON; give at most {CHARACTERS:,}"
            raise ApiError(400, reason, name)
    return request, row


def refusal(error: ValidationError) -> ApiError:
    """The error for the first wrong field. Of a field of several types, that which fits best is told of."""
    found = [one | {"loc": place_of(one)} for one in error.errors(include_url=False)]
    first = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    wrong = max(first, key=lambda one: (len(one["loc"]), one["type"] == "too_long"))
    *within, last = wrong["loc"] or ("",)
    named = [part for part in within if isinstance(part, int) or part in FIELDS]  # others are names of types
    if last in FIELDS or isinstance(last, int) or wrong["type"] == "extra_forbidden":
        named.append(last)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named)
    place = place.removeprefix(".")
    message = wrong["msg"].removeprefix("Value error, ")
    if wrong["type"] == "extra_forbidden":
        message = "this field is not known; leave it out"
    elif wrong["type"] == "missing":
        message = "this field is missing"
    elif isinstance(wrong["input"], str | int | float | bool | None):
        message += f", got {describe(wrong['input'])}"
    field = message.split()[0].rstrip(":")
    if field in FIELDS and isinstance(wrong["input"], dict):  # the text of a whole object begins with its field
        return ApiError(400, f"{place}.{message}".strip("."), f"{place}.{field}".strip("."))
    return ApiError(400, f"{place}: {message}" if place else message, place or field)


def place_of(error: dict) -> tuple[str | int, ...]:
    """Where an error of pydantic is, with the field that our own error of an unknown field names."""
    return (*error["loc"], *error.get("ctx", {}).get("unknown", ()))
