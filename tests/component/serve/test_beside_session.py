"""A served model answers as its session does, alone and together with others."""

import threading
from functools import partial

import openai
import pytest

from component.inference.sampling import Sampling
from component.inference.session import Session
from tests.component.serve.conftest import Running

QUESTIONS = ["Hello", "你好，世界", "word " * 30]


@pytest.fixture(params=["chatglm", "llama"])
def session(request, model_folder, adapter_folder) -> Session:
    base = model_folder(request.param)
    return Session.open(str(base), adapter_folder(base), base_bits=16, device="cpu")


def test_answers_are_those_of_the_session_also_together(session):
    expected = {
        (question, adapted): session.ask([{"role": "user", "content": question}], None, sampling, adapted)
        for sampling in [Sampling(max_new_tokens=6)]
        for question in QUESTIONS
        for adapted in (True, False)
    }
    server = Running(session, partial(session.open_engine, 4))
    found = {}

    def ask(question: str, adapted: bool) -> None:
        answer = server.chat(question, model="tuned" if adapted else "base", max_tokens=6)
        found[question, adapted] = answer.choices[0]

    try:
        threads = [threading.Thread(target=ask, args=key) for key in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for key, answer in expected.items():
            assert (found[key].message.content or "") == answer.text, key
            assert found[key].finish_reason == answer.finish_reason
        asked = Sampling(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=5)
        drawn = session.ask([{"role": "user", "content": "Hello"}], None, asked)
        told = server.chat(n=2, content="Hello", max_tokens=6, temperature=0.8, top_p=0.9, seed=5, logprobs=True)
        assert (told.choices[0].message.content or "") == drawn.text
        assert told.usage.prompt_tokens_details.cached_tokens >= 0
        assert all(entry.logprob <= 0 for choice in told.choices for entry in choice.logprobs.content)
    finally:
        server.close()


TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("clock", "get_weather")
]


def test_tool_choice_decides_whether_an_answer_calls(model_folder):
    session = Session.open(str(model_folder()), base_bits=16, device="cpu")
    server = Running(session, partial(session.open_engine, 4), models={"m": False})
    try:
        for stream in (False, True):
            ask = partial(server.chat, "Hello", model="m", tools=TOOLS, max_tokens=30, temperature=1.0, stream=stream)
            named = ask(tool_choice={"type": "function", "function": {"name": "get_weather"}}, n=4, seed=1)
            either, none = ask(tool_choice="required", n=4, seed=1), ask(tool_choice="none", n=4, seed=1)
            assert called(named) == ["get_weather"] * 4
            assert len(called(either)) == 4 and set(called(either)) <= {"clock", "get_weather"}
            assert called(none) == []
    finally:
        server.close()


def test_a_format_without_calls_says_so(model_folder):
    session = Session.open(str(model_folder("llama")), base_bits=16, device="cpu", data_format="firefly")
    server = Running(session, partial(session.open_engine, 4), models={"m": False})
    try:
        with pytest.raises(openai.BadRequestError, match="firefly has no place for tools"):
            server.chat("Hello", model="m", tools=TOOLS, tool_choice="required")
    finally:
        server.close()


def called(answer) -> list[str]:
    """Names of the first call of each answer, of a whole response or a stream."""
    if hasattr(answer, "choices"):
        return [choice.message.tool_calls[0].function.name for choice in answer.choices if choice.message.tool_calls]
    deltas = [choice.delta for chunk in answer for choice in chunk.choices]
    first = [call for delta in deltas for call in delta.tool_calls or () if call.index == 0 and call.id]
    return [call.function.name for call in first]
