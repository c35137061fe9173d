"""A hub that refuses, is silent, or is not asked, on sockets of this machine."""

import socket
import time

import pytest
from huggingface_hub import constants

from component.run.errors import ArgumentError
from component.run.hub import require_hub_or_cache, silence_of


@pytest.fixture
def listener():
    """A socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def own_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("component.run.hub.PATIENCE", 1)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    silence_of.cache_clear()


def cache(folder, name: str) -> None:
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123")
    (repository / "snapshots/0123").mkdir(parents=True)
    (repository / "snapshots/0123/config.json").write_text("{}")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "silent", "not an address"])
def test_a_hub_that_cannot_be_reached_is_said_in_seconds_with_the_ways_on(listener, endpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", listener if endpoint == "silent" else endpoint)
    begun = time.monotonic()
    for _ in range(20):  # the answer is remembered
        with pytest.raises(ArgumentError) as refused:
            require_hub_or_cache("THUDM/chatglm3-6b")
    assert time.monotonic() - begun < 5
    for way in ("HF_ENDPOINT=", "modelscope download --model ZhipuAI/chatglm3-6b ", "model_name_or_path=/path/to/"):
        assert way in str(refused.value)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("zai-org/glm-4-9b-hf", "ZhipuAI/glm-4-9b-hf"),
        ("meta-llama/Llama-3.1-8B", "LLM-Research/Llama-3.1-8B"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("gpt2", "gpt2"),
    ],
)
def test_the_command_for_modelscope_has_the_name_that_a_publisher_has_there(name, there, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArgumentError, match=f"modelscope download --model {there} --local_dir models/"):
        require_hub_or_cache(name)


def test_an_adapter_is_looked_for_by_its_own_file_and_named_by_its_own_setting(tmp_path, monkeypatch):
    cache(tmp_path, "someone/adapter")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = ("someone/adapter", "adapter_name_or_path", ("adapter_config.json", "adapter_model.safetensors"))
    with pytest.raises(ArgumentError) as refused:
        require_hub_or_cache(*asked)
    way = "  a folder: adapter_name_or_path=/path/to/adapter, with adapter_config.json and adapter_model.safetensors\n"
    assert way in str(refused.value)


def test_where_the_hub_is_silent_the_cache_is_used_and_the_hub_not_asked_again(listener, monkeypatch, tmp_path, log):
    cache(tmp_path, "THUDM/chatglm3-6b")
    monkeypatch.setattr(constants, "ENDPOINT", listener)
    require_hub_or_cache("THUDM/chatglm3-6b")
    assert constants.HF_HUB_OFFLINE
    assert ["WARNING" in line and "taking THUDM/chatglm3-6b from the cache" in line for line in log] == [True]
    require_hub_or_cache("THUDM/chatglm3-6b")
    assert len(log) == 1
    with pytest.raises(ArgumentError, match="HF_HUB_OFFLINE is set"):
        require_hub_or_cache("THUDM/chatglm2-6b")


def test_a_hub_that_answers_is_left_to_its_library(monkeypatch):
    monkeypatch.setattr("component.run.hub.huggingface_hub.get_session", lambda: Answering())
    assert silence_of("http://127.0.0.1:9") == ""
    require_hub_or_cache("THUDM/chatglm3-6b")


class Answering:
    def head(self, url: str, timeout: float) -> int:
        return 404
