"""What OpenAI's own client gets of a server: answers, calls, streams, and errors."""

import json
import re
import threading

import openai
import pytest

from tests.component.serve.conftest import wait_until

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "d", "parameters": {"type": "object"}}}
CALL = "get_weather\n ```python\ntool_call(city='北京')\n```"
CALLS = ("\n see", CALL, "clock\n ```python\ntool_call()\n```")


def folded(chunks) -> dict:
    """What a client keeps of a stream: {content, reasoning, calls, finish_reason}."""
    kept = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk.choices:
            kept["content"] += choice.delta.content or ""
            kept["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    kept["calls"].append([call.id, call.function.name, ""])
                kept["calls"][call.index][2] += call.function.arguments
            kept["finish_reason"] = choice.finish_reason or kept["finish_reason"]
    return kept


def test_an_answer_is_openais_object(server, write):
    server.engine.answers = [write("\n Hello, world!")]
    answer = server.chat()
    assert answer.choices[0].message.to_dict() == {"role": "assistant", "content": "Hello, world!", "refusal": None}
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "tuned", "fp_tuned")
    assert answer.id.startswith("chatcmpl-") and answer.id != server.chat().id
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].index == 0
    prompt = server.service.session.prompt(server.service.session.conversation([{"role": "user", "content": "q"}]))
    used, written = answer.usage, len(write("\n Hello, world!"))
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (
        len(prompt),
        written,
        len(prompt) + written,
    )
    assert used.prompt_tokens_details.cached_tokens == 0
    assert server.engine.asked[0].prompt == prompt
    sampling = server.engine.asked[0].sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 4000 - len(prompt))


def test_models_are_the_tuned_one_and_its_base(server, write):
    assert [model.id for model in server.client.models.list()] == ["tuned", "base"]
    assert server.client.models.retrieve("base").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, but tuned and base"):
        server.client.models.retrieve("other")
    server.engine.answers = [write("\n a")]
    for model, adapted in (("tuned", True), ("base", False)):
        server.chat(model=model)
        assert server.engine.asked[-1].adapted is adapted
    with pytest.raises(openai.NotFoundError) as unknown:
        server.chat(model="gpt-4")
    assert unknown.value.code == "model_not_found"
    assert server.send(body={"messages": []}).json["error"]["param"] == "model"
    assert server.send("/health").json == {"status": "ok", "active": 0}


def test_the_fold_of_a_stream_is_the_whole_answer(server, write):
    server.engine.answers = [write("\n <think>\nwhy\n</think>\n\nsee", *CALLS[1:])]
    whole = server.chat(tools=[WEATHER, CLOCK]).choices[0]
    chunks = list(server.chat(tools=[WEATHER, CLOCK], stream=True))
    kept = folded(chunks)
    message = whole.message
    assert kept["content"] == message.content == "see"
    assert kept["reasoning"] == message.reasoning_content == "why"
    assert kept["finish_reason"] == whole.finish_reason == "tool_calls"
    assert [call[1:] for call in kept["calls"]] == [
        [call.function.name, call.function.arguments] for call in message.tool_calls
    ]
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
        ("get_weather", {"city": "北京"}),
        ("clock", {}),
    ]
    assert len({call.id for call in message.tool_calls}) == 2
    assert {call.type for call in message.tool_calls} == {"function"}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


def test_an_answer_of_calls_alone_has_no_content(server, write):
    server.engine.answers = [write(CALL)]
    assert server.chat(tools=[WEATHER]).choices[0].message.content is None


def events_of(text: str) -> list:
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]


def test_a_stream_is_events_in_openais_order(server, write):
    server.engine.answers = [write(*CALLS)]
    body = {"model": "tuned", "messages": [{"role": "user", "content": "q"}], "tools": [WEATHER, CLOCK]}
    answer = server.send(body=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = events_of(answer.text)
    assert done == "[DONE]"
    *chunks, usage = map(json.loads, events)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(write(*CALLS))
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    seen = set()
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if call["index"] in seen:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
            else:
                assert call["type"] == "function" and call["id"] and call["function"]["arguments"] == ""
                seen.add(call["index"])
    assert seen == {0, 1}
    without = events_of(server.send(body=body | {"stream": True}).text)
    assert all("usage" not in json.loads(event) for event in without[:-1])


def test_a_conversation_with_calls_and_results_by_id_is_the_prompt_of_training(server, write):
    server.engine.answers = [write(*CALLS), write("\n 24")]
    asked = [{"role": "developer", "content": "brief"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]
    answer = server.chat(asked, tools=[WEATHER, CLOCK]).choices[0].message
    first, second = answer.tool_calls
    results = [
        {"role": "tool", "tool_call_id": second.id, "content": "12", "name": "clock"},
        {"role": "tool", "tool_call_id": first.id, "content": "24"},
    ]
    said = server.chat([*asked, answer.model_dump(), *results], tools=[WEATHER, CLOCK])
    assert said.choices[0].message.content == "24"
    rows = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "see"},
        {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": "24", "joined": True},
        {"role": "tool", "name": "clock", "parameters": {}, "observation": "12", "joined": True},
    ]
    session = server.service.session
    tools = [WEATHER["function"], CLOCK["function"]]
    assert server.engine.asked[-1].prompt == session.prompt(session.conversation(rows, tools))


def test_strict_false_of_a_function_is_not_shown(server, write):
    server.engine.answers = [write(CALL)]
    server.chat(tools=[WEATHER])
    server.chat(tools=[WEATHER | {"function": WEATHER["function"] | {"strict": False}}])
    assert server.engine.asked[0].prompt == server.engine.asked[1].prompt


def test_a_cut_answer_ends_with_length_also_in_a_call(server, write):
    server.engine.answers = [write("\n Hello, world!")]
    for field in ("max_tokens", "max_completion_tokens"):
        answer = server.chat(**{field: 3})
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    server.engine.answers = [write(CALL)]
    assert server.chat(tools=[WEATHER], max_tokens=len(write(CALL)) - 3).choices[0].finish_reason == "length"


def test_a_stop_ends_the_text_and_is_not_in_it(server, write):
    server.engine.answers = [write("\n Hello, world! tool_call(days=2)")]
    whole = server.chat(stop=["tool_", ", wor", "ld"]).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("Hello", "stop")
    assert folded(server.chat(stop=", wor", stream=True))["content"] == "Hello"
    assert len(server.engine.cancelled) == 2
    kept = folded(server.chat(stop=", world? ", stream=True))
    assert kept["content"] == "Hello, world! tool_call(days=2)"


def test_an_answer_that_a_stop_has_ended_is_not_written_on_beside_others(server, write):
    server.engine.answers = [write("\n a stop" + " word" * 30), write("\n a" + " word" * 30)]
    stopped, whole = server.chat(n=2, stop="stop").choices
    assert (stopped.message.content, whole.message.content) == ("a ", "a" + " word" * 30)
    first, second = server.engine.asked
    assert len(first.tokens) < len(second.tokens) / 2


def test_a_line_end_within_a_text_is_none_of_the_stream(server, write):
    server.engine.answers = [write("\n a\u2028b\x85c")]
    body = {"model": "tuned", "messages": [{"role": "user", "content": "q"}], "stream": True}
    text = server.send(body=body).text
    assert "\u2028" not in text and "\\u2028" in text
    assert folded(server.chat(stream=True))["content"] == server.chat().choices[0].message.content


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([{"role": "tool", "tool_call_id": "x", "content": "1"}], "messages[1]", 'answers no call with the id "x"'),
        ([{"role": "assistant", "content": "a"}], "messages", "end on an answer"),
        ([{"role": "user", "content": None}], "messages[1].content", "must be text"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}],
            "messages[1].tool_calls[0].function.arguments",
            "not JSON",
        ),
    ],
)
def test_what_training_would_refuse_is_refused_with_its_place(server, messages, param, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as refused:
        server.chat([{"role": "user", "content": "q"}, *messages])
    assert refused.value.param == param and not server.engine.asked


def test_a_stop_does_not_count_within_a_call(server, write):
    server.engine.answers = [write(CALL)]
    answer = server.chat(tools=[WEATHER], stop=["city", "北"]).choices[0]
    assert json.loads(answer.message.tool_calls[0].function.arguments) == {"city": "北京"}
    assert answer.finish_reason == "tool_calls"


def test_without_parallel_calls_the_answer_ends_after_the_first(server, write):
    server.engine.answers = [write(*CALLS, "\n " + "more " * 40)]
    answer = server.chat(tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "北京"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens == len(write(*CALLS[:2])) + 1  # the token that begins what follows
    kept = folded(server.chat(tools=[WEATHER, CLOCK], parallel_tool_calls=False, stream=True))
    assert [call[1] for call in kept["calls"]] == ["get_weather"] and kept["content"] == "see"


@pytest.mark.parametrize("parallel", [True, False])
def test_what_was_held_for_a_stop_is_told_at_the_end(server, write, parallel):
    server.engine.answers = [write("\n see ST", *CALLS[1:])]
    fields = {"tools": [WEATHER, CLOCK], "stop": "STOP", "parallel_tool_calls": parallel}
    assert server.chat(**fields).choices[0].message.content == "see ST"
    assert folded(server.chat(**fields, stream=True))["content"] == "see ST"


def test_several_answers_have_seeds_of_their_own(server, write):
    server.engine.answers = [write("\n a"), write("\n b"), write("\n c")]
    answer = server.chat(n=3, seed=7, top_p=0.5, temperature=0.3, extra_body={"top_k": 4})
    assert [choice.message.content for choice in answer.choices] == ["a", "b", "c"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    asked = [one.sampling for one in server.engine.asked]
    assert [one.seed for one in asked] == [7, 8, 9]
    assert {(one.temperature, one.top_p, one.top_k) for one in asked} == {(0.3, 0.5, 4)}


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [({}, 0), ({"seed": 1}, 1), ({"top_p": 0.9}, 1), ({"n": 2}, 1), ({"n": 1, "top_p": 1}, 0), ({"temperature": 0}, 0)],
)
def test_without_a_temperature_an_answer_is_greedy_unless_draws_are_asked_for(server, write, fields, temperature):
    server.engine.answers = [write("\n a")]
    server.chat(**fields)
    assert server.engine.asked[0].sampling.temperature == temperature


def test_logprobs_are_those_of_every_token_with_its_bytes(server, write):
    server.engine.answers = [write("\n 你好, 晴")]
    whole = server.chat(logprobs=True, top_logprobs=2)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert bytes(byte for entry in entries for byte in entry.bytes).decode().strip() == "你好, 晴"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.token == bytes(entry.bytes).decode("utf-8", "replace") for entry in entries)
    streamed = [
        entry
        for chunk in server.chat(logprobs=True, top_logprobs=2, stream=True)
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert streamed == entries
    alone = server.chat(logprobs=True).choices[0].logprobs.content
    assert [entry.logprob for entry in alone] == [-0.5] * len(entries) and alone[0].top_logprobs == []
    assert server.chat().choices[0].logprobs is None


@pytest.mark.parametrize(
    ("answer", "fields", "count"),
    [
        (("\n a STOP b",), {"stop": "STOP"}, ("\n a STOP",)),
        (("\n a STOP b",), {"stop": "TO"}, ("\n a STO",)),
        ((*CALLS, "\n b"), {"tools": [WEATHER, CLOCK], "parallel_tool_calls": False}, CALLS[:2]),
    ],
)
def test_usage_and_logprobs_count_every_token_that_was_written_of_an_answer_that_was_ended(
    server, write, answer, fields, count
):
    server.engine.answers = [write(*answer)]
    whole = server.chat(logprobs=True, **fields)
    *chunks, last = server.chat(logprobs=True, stream=True, stream_options={"include_usage": True}, **fields)
    written = len(write(*count)) + (len(count) > 1)  # the token that begins what follows a call tells of its end
    streamed = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content]
    assert written == whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    assert written == last.usage.completion_tokens == len(streamed)


def test_a_conversation_without_room_is_refused_with_both_figures(server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.chat(max_tokens=10**9)
    assert refused.value.code == "context_length_exceeded"
    assert "a context of 4,000 tokens" in str(refused.value) and "1,000,000,000 more" in str(refused.value)
    with pytest.raises(openai.BadRequestError, match=r"the messages have 15,0[0-9]+; shorten them"):
        server.chat("word " * 5000)
    assert not server.engine.asked


def test_requests_that_arrive_together_are_answered_together(server, write):
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 20)], 0.01
    threads = [threading.Thread(target=server.chat, args=(f"q{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.engine.running) == 8)
    for thread in threads:
        thread.join()
    assert server.engine.steps < 4 * len(server.engine.answers[0])


def test_a_client_that_goes_away_is_cancelled(server, write):
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 900)], 0.005
    for stream in (False, True):
        body = {"model": "tuned", "messages": [{"role": "user", "content": "q"}], "stream": stream}
        connection = server.post(body)
        wait_until(lambda: server.engine.running)
        connection.close()
        wait_until(lambda: server.service.active == 0, 2)
        wait_until(lambda: server.engine.cancelled, 1)
        assert server.engine.cancelled.pop().finish_reason == "cancelled"
        server.engine.running.clear()


def test_a_step_that_fails_ends_what_runs_and_the_server_goes_on(server, write, log):
    server.engine.answers = [write("\n secret words")]
    server.engine.fault = RuntimeError("CUDA out of memory. Tried to allocate\nmore")
    with pytest.raises(openai.InternalServerError) as failed:
        server.chat()
    assert failed.value.body["type"] == "server_error"
    told = [line for line in log if "a step failed" in line]
    assert len(told) == 1 and "RuntimeError at conftest.py" in told[0] and "CUDA out of memory" in told[0]
    assert server.chat().choices[0].message.content == "secret words"
    server.engine.fault = ValueError("'secret words'")
    with pytest.raises(openai.APIError, match="could not go on"):
        list(server.chat(stream=True))
    assert "secret" not in "".join(log)


def test_an_answer_that_cannot_be_told_ends_alone(server, write, log, monkeypatch):
    server.engine.answers = [write("\n a")]
    read = server.service.session.answer_stream
    monkeypatch.setattr(server.service.session, "answer_stream", lambda tools: None)
    with pytest.raises(openai.InternalServerError):
        server.chat()
    monkeypatch.setattr(server.service.session, "answer_stream", read)
    assert server.chat().choices[0].message.content == "a"
    assert "AttributeError" in "".join(log)


def test_too_many_are_told_to_come_back(start, write):
    server = start(most=3)
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 400)], 0.02
    body = {"model": "tuned", "messages": [{"role": "user", "content": "q"}]}
    held = [server.post(body), server.post(body)]
    wait_until(lambda: server.service.active == 2)
    with pytest.raises(openai.RateLimitError, match="the server is busy: at most 3 answers run or wait") as refused:
        server.chat(n=2)
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert server.service.active == 2
    for connection in held:
        connection.close()
    wait_until(lambda: server.service.active == 0)
    server.engine.answers = [[]]
    assert server.chat().choices[0].finish_reason == "stop"


def test_a_request_that_takes_too_long_is_ended(start, write, monkeypatch):
    monkeypatch.setattr("component.serve.app.REQUEST_SECONDS", 0.2)
    server = start()
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 400)], 0.02
    with pytest.raises(openai.InternalServerError) as late:
        server.chat()
    assert late.value.status_code == 504 and len(server.engine.cancelled) == 1


def test_nothing_of_prompt_answer_and_key_is_logged(start, write, log):
    server = start(key="k" * 20)
    server.engine.answers = [write("\n Hello, world!")]
    server.chat("topsecret")
    list(server.chat("topsecret", stream=True))
    wait_until(lambda: sum("POST /v1/chat/completions 200 tuned" in line for line in log) == 2)
    assert not [word for word in ("topsecret", "Hello", "world", "k" * 20) if word in "".join(log)]


@pytest.mark.parametrize("choice", ["none", "required", {"type": "function", "function": {"name": "clock"}}])
def test_tool_choice_limits_how_an_answer_begins(server, write, choice, monkeypatch):
    asked = []
    session = server.service.session
    monkeypatch.setattr(session, "must_not_call", lambda sampling, tools: asked.append(None) or sampling, raising=False)
    monkeypatch.setattr(
        session, "must_call", lambda sampling, names, tools: asked.append(names) or sampling, raising=False
    )
    server.engine.answers = [write(CALL)]
    server.chat(tools=[WEATHER, CLOCK], tool_choice="auto")
    assert asked == []
    server.chat(tools=[WEATHER, CLOCK], tool_choice=choice)
    assert asked == [{"none": None, "required": ["get_weather", "clock"]}.get(str(choice), ["clock"])]


def test_the_page_is_given_with_its_policy_as_a_header_and_without_data(start):
    page = start(key="k" * 20).send("/")
    assert page.status == 200 and '<script type="application/json" id="data">{}</script>' in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'; frame-ancestors 'none'" in policy
