import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationMixin

from component.chatglm import ChatGLMForConditionalGeneration
from component.chatglm.versions import CACHE, TESTED, check_generation, warn_if_untested
from component.model import from_pretrained
from component.run.errors import ArgumentError

ROOT = Path(__file__).parents[3]
GREEDY = {"do_sample": False, "max_new_tokens": 4}
KNOWN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "cache_position": torch.arange(6),
    "num_items_in_batch": 6,
    "is_causal": None,
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 6])),
    **dict.fromkeys(("max_length_q", "max_length_k"), 6),
}
IDS = torch.tensor([[5, 17, 40, 9, 301, 77]])


@pytest.fixture(autouse=True)
def new_process():
    """What is done once a process is done in each test."""
    for once in (check_generation, warn_if_untested):
        once.cache_clear()
    yield
    for once in (check_generation, warn_if_untested):
        once.cache_clear()


@pytest.fixture
def rename_cache(monkeypatch):
    """Has generate hand models their cache under another name, or not at all."""

    def rename(name: str | None) -> None:
        prepare = GenerationMixin.prepare_inputs_for_generation

        def prepare_otherwise(self, *args, **kwargs):
            inputs = prepare(self, *args, **kwargs)
            cache = inputs.pop(CACHE, None)
            return inputs if name is None or cache is None else inputs | {name: cache}

        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare_otherwise)

    return rename


# What forward takes


@pytest.mark.parametrize("part", ["head", "body"])
@torch.no_grad()
def test_a_keyword_that_forward_does_not_know_is_an_error_that_names_it(make_model, part):
    model = make_model()
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_value'"):
        (model if part == "head" else model.transformer)(IDS, past_key_value=DynamicCache())
    for keyword in KNOWN:
        assert torch.equal(model(IDS, **{keyword: KNOWN[keyword]}).logits, model(IDS).logits), keyword


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_used_under_either_name(make_model, name):
    model = make_model()
    first = model(IDS[:, :4], **{name: DynamicCache(config=model.config)})
    assert first[CACHE] is first.past_key_values
    assert first[CACHE].get_seq_length() == 4
    second = model(IDS[:, 4:], **{name: first[CACHE]})
    assert second[CACHE].get_seq_length() == 6
    assert (second.logits - model(IDS).logits[:, 4:]).abs().max() <= 1e-5


def test_layers_that_are_checkpointed_leave_a_cache_alone(make_model):
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cache = DynamicCache(config=model.config)
    model(IDS, labels=IDS, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0


# Versions that no test has seen


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_makefile_runs_the_tests_on_every_tested_version():
    command = ["make", "--dry-run", "--old-file=.venv/ready", "test-versions"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"for version in {' '.join(TESTED)};" in told


@pytest.mark.parametrize("name", ["store", None])
@pytest.mark.parametrize("ask", ["chat", "stream_chat", "generate"])
def test_no_answer_is_given_where_the_cache_has_another_name(
    make_model, tiny_tokenizer, monkeypatch, rename_cache, ask, name
):
    model = make_model()
    answers = {
        "chat": lambda: model.chat(tiny_tokenizer, "a", **GREEDY),
        "stream_chat": lambda: list(model.stream_chat(tiny_tokenizer, "a", **GREEDY)),
        "generate": lambda: model.generate(IDS, **GREEDY),
    }
    answers[ask]()
    check_generation.cache_clear()
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    rename_cache(name)
    why = "unexpected keyword argument 'store'" if name else r"with its cache, generation is off by \d"
    told = f"transformers 5.99.0 is installed; tested are {', '.join(TESTED)}.*{why}.*Install one of the tested"
    for _ in range(2):  # also the second time
        with pytest.raises(ArgumentError, match=told):
            answers[ask]()


def test_the_check_is_made_once_in_milliseconds_and_draws_no_random_number(make_model, monkeypatch):
    made = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda *args, **kwargs: made.append(1) or generate(*args, **kwargs)
    )
    model, before = make_model(), torch.get_rng_state()
    check_generation(ChatGLMForConditionalGeneration)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        model.generate(IDS, **GREEDY)
    assert len(made) == 2 + 2
    times = []
    for _ in range(5):
        check_generation.cache_clear()
        start = time.thread_time()  # a busy machine is no reason to fail
        check_generation(ChatGLMForConditionalGeneration)
        times.append(time.thread_time() - start)
    assert min(times) < 0.05


def test_the_check_passes_whatever_the_caller_computes_in(make_model):
    check_generation.cache_clear()
    with torch.autocast("cpu"), torch.device("meta"):
        check_generation(ChatGLMForConditionalGeneration)
    assert check_generation.cache_info().misses == 1, "it was made, and raised nothing"


def test_an_untested_version_is_named_once_where_a_program_starts(model_folder, monkeypatch, log):
    folder = str(model_folder())

    def load() -> list[str]:
        for auto_class in (transformers.AutoConfig, transformers.AutoTokenizer):
            from_pretrained(auto_class, folder)
        return [line for line in log if "tested" in line]

    monkeypatch.setattr(transformers, "__version__", TESTED[-1])
    assert load() == []
    warn_if_untested.cache_clear()
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    (line,) = load()
    assert re.search(rf"WARNING.*transformers 5\.99\.0 is installed; tested are {', '.join(TESTED)}", line)
