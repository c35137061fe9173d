"""A served model answers as its session does, alone and together with others."""

import threading

import pytest

from component.inference.engine import Engine
from component.inference.sampling import Sampling
from component.inference.session import Session
from tests.component.serve.conftest import Running

QUESTIONS = ["Hello", "你好，世界", "word " * 30, "tool_call(city='北京')", "Hello, world! Hello, world!"]


@pytest.fixture(params=["chatglm", "llama"])
def session(request, model_folder, adapter_folder) -> Session:
    base = model_folder(request.param)
    return Session.open(str(base), adapter_folder(base), base_bits=16, device="cpu")


def test_answers_are_those_of_the_session_also_together(session):
    expected = {
        (question, adapted): session.ask([{"role": "user", "content": question}], None, sampling, adapted)
        for sampling in [Sampling(max_new_tokens=12)]
        for question in QUESTIONS
        for adapted in (True, False)
    }
    server = Running(session, lambda: Engine(session.model, session.stop_ids, max_batch=4))
    found = {}

    def ask(question: str, adapted: bool) -> None:
        answer = server.chat(question, model="tuned" if adapted else "base", max_tokens=12)
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
        asked = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5)
        drawn = session.ask([{"role": "user", "content": "Hello"}], None, asked)
        told = server.chat(n=2, content="Hello", max_tokens=12, temperature=0.8, top_p=0.9, seed=5, logprobs=True)
        assert (told.choices[0].message.content or "") == drawn.text
        assert told.usage.prompt_tokens_details.cached_tokens >= 0
        assert all(entry.logprob <= 0 for choice in told.choices for entry in choice.logprobs.content)
    finally:
        server.close()
