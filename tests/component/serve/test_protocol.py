"""Requests are read strictly: what cannot be done is refused by an error that names the field."""

import json

import pytest

from component.run.errors import DataError
from component.serve import protocol
from component.serve.protocol import ApiError, bad_request, read_request

QUESTION = {"role": "user", "content": "q"}
BODY = {"model": "m", "messages": [QUESTION]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def refused(body) -> ApiError:
    with pytest.raises(ApiError) as error:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert error.value.status == 400
    assert error.value.body["error"]["type"] == "invalid_request_error"
    return error.value


def answered(message: dict) -> list[dict]:
    return [QUESTION, {"role": "assistant", "tool_calls": [CALL]}, message]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is no JSON that can be read: column 1: not JSON"),
        (b"\xff", "the body is no JSON that can be read: 'utf-8' codec"),
        (b"[]", "the body must be an object with model and messages, got [] (list)"),
        (b'{"model": "m", "model": "n"}', "'model' occurs twice in one object"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": 1e999}', "the number 1e999 is out of range"),
        (b'{"a": ' + b"[" * 100_000, "nested more than"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number of more than 4,300 digits"),
        (b'{"model": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_no_strict_json_is_refused(body, message):
    assert message in str(refused(body))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1 (int)"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 1_000_000}, "n", "less than or equal to 16"),
        ({"n": 1.0}, "n", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "max_completion_tokens differ; give one"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream true"),
        ({"messages": []}, "messages", "is empty; give a question"),
        ({"messages": [QUESTION] * 2001}, "messages", "at most 2000 items"),
        ({"messages": [{"role": "usr", "content": "q"}]}, "messages[0].role", "'system', 'developer'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[0].type",
            "parts of text alone are read, no pictures",
        ),
        ({"messages": [QUESTION | {"name": "Ann"}]}, "messages[0].name", "has no place in the model's prompt"),
        ({"messages": [QUESTION | {"weight": 1}]}, "messages[0].weight", "not known"),
        (
            {"messages": [QUESTION | {"tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "tool_calls belongs to a message of",
        ),
        ({"messages": answered({"role": "tool", "content": "1"})}, "messages[2].tool_call_id", "is missing"),
        (
            {"messages": answered({"role": "tool", "tool_call_id": "a", "name": "g", "content": "1"})},
            "messages[2].name",
            "is 'g', and the call is one of 'f'",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "functions alone can be offered"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
        ({"tools": [TOOL, TOOL]}, "tools", "has the function 'f' twice"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function.strict",
            "leave strict out",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools offers no function"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g' is none of f",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice.type",
            "one function can be chosen",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "prompts are those of training"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "prompts are those of training"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported: leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported: ask for the form"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported: use tools"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"audio": {"voice": "v"}}, "audio", "not supported"),
        ({"store": True}, "store", "nothing is stored"),
    ],
)
def test_a_wrong_or_unsupported_field_is_refused_by_name(fields, param, message):
    error = refused(BODY | fields)
    assert error.param == param
    assert param in str(error) and message in str(error)


MANY = 3000
UNKNOWN = {f"x{i}": 0 for i in range(MANY)}


def message(**fields) -> dict:
    return {"messages": [QUESTION, QUESTION | fields]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (message(content=[{"type": "x"}] * MANY), "messages[1].content[0].type"),
        (message(content=[{"type": "text", "text": "a"}] * MANY), "messages[1].content"),
        (message(content=[{"type": "text", "text": "a"} | UNKNOWN]), "messages[1].content[0].x0"),
        (message(role="assistant", tool_calls=[{}] * MANY), "messages[1].tool_calls[0].id"),
        (message(role="assistant", tool_calls=[CALL] * MANY), "messages[1].tool_calls"),
        (message(role="assistant", tool_calls=[CALL | {"function": UNKNOWN}]), "messages[1].tool_calls[0].function.x0"),
        (message(annotations=[1] * MANY), "messages[1].annotations"),
        (message(**UNKNOWN), "messages[1].x0"),
        ({"messages": [QUESTION, *[{}] * 1000]}, "messages[1].role"),
        (UNKNOWN, "x0"),
        ({"tools": [{}] * 100}, "tools[0].type"),
        ({"tools": [TOOL | UNKNOWN]}, "tools[0].x0"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": UNKNOWN}}, "tool_choice.function.x0"),
        ({"tools": [TOOL], "tool_choice": UNKNOWN}, "tool_choice.x0"),
        ({"stop": [1] * MANY}, "stop[0]"),
        ({"stop": ["a"] * MANY}, "stop"),
        ({"stream": True, "stream_options": UNKNOWN}, "stream_options.x0"),
        ({"metadata": UNKNOWN, "n": 0}, "n"),
    ],
)
def test_of_many_wrong_things_the_first_alone_is_made_an_error_of(fields, param, monkeypatch):
    counts = []
    told = protocol.refusal
    monkeypatch.setattr(protocol, "refusal", lambda error: counts.append(error.error_count()) or told(error))
    assert refused(BODY | fields).param == param
    assert counts[0] < 10


def test_what_is_parsed_once_more_is_not_long():
    long = "a" * protocol.CHARACTERS
    for fields, param in (
        (message(role="assistant", content=long), "messages"),
        (message(role="assistant", tool_calls=[CALL | {"function": {"name": "f", "arguments": long}}]), "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": long}}]}, "tools"),
    ):
        error = refused(BODY | fields)
        assert error.param == param and "characters of JSON; give at most 524,288" in str(error)
    assert read_request(json.dumps(BODY | message(content=long)).encode())


def test_values_that_change_nothing_are_accepted():
    request, row = read_request(
        json.dumps(
            BODY
            | {
                "frequency_penalty": 0,
                "presence_penalty": 0.0,
                "logit_bias": {},
                "response_format": {"type": "text"},
                "functions": None,
                "store": False,
                "service_tier": "auto",
                "modalities": ["text"],
                "user": "u",
                "metadata": {"a": "b"},
                "n": 1,
                "tools": [],
                "tool_choice": "auto",
                "parallel_tool_calls": True,
                "stop": None,
                "temperature": 0,
                "top_k": -1,
            }
        ).encode()
    )
    assert request.model == "m" and row["messages"] == [QUESTION]
    assert not request.is_drawn


def test_an_answer_comes_back_as_the_client_has_it():
    message = {"role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None}
    message |= {"function_call": None, "tool_calls": [CALL | {"index": 0}], "reasoning_content": "why"}
    request, _ = read_request(json.dumps(BODY | {"messages": answered(message)}).encode())
    assert request.messages[2].tool_calls[0].function.name == "f"


def test_an_answer_of_the_models_own_that_cannot_be_read_again_is_refused_with_the_way_on():
    error = bad_request(DataError("messages[1].tool_calls[0].function.arguments: column 2: not JSON"))
    assert error.param == "messages[1].tool_calls[0].function.arguments"
    assert str(error).endswith("not JSON; mend it, or leave out this answer and the results of its calls")
