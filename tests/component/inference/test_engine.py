"""Tokens of the engine are those of transformers' `generate`, whatever else is answered beside them."""

import gc
import random
import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, OPTConfig

from component.data.chat_text import common_prefix
from component.inference import slots
from component.inference.engine import Engine
from component.inference.sampling import Sampling
from component.kernel import decoder, plain
from component.kernel.decoder import FlashCache, Graph, Part, PlainCache, fit_cache
from component.kernel.projection import Projection
from component.model import find_linear_names
from component.run.errors import ArgumentError, DataError
from tests.component.kernel.conftest import CONFIGS, make_model

from .conftest import STOPS, answer_by_generate, make_prompts

TWELVE = Sampling(max_new_tokens=12)


def answers(generations):
    return [(generation.tokens, generation.stop_id) for generation in generations]


def make_unfused(config, **changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=97, **sizes, **changes))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=find_linear_names(model)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.2)
    return model


@pytest.mark.parametrize(
    ("family", "rank"), [*((family, 16) for family in CONFIGS), ("chatglm", 3), ("llama", 3)], ids=str
)
def test_greedy_answers_are_those_of_generate_with_and_without_the_adapter(family, rank):
    model = make_model(family, rank=rank).eval()
    prompts = make_prompts((9, 1, 23, 14, 5))
    engine = Engine(model, STOPS, max_batch=3, max_tokens=48)
    asked = [engine.submit(prompt, TWELVE, adapted) for prompt in prompts[:3] for adapted in (True, False)]
    asked += [engine.submit(prompt, TWELVE) for prompt in prompts[3:]]
    while engine.is_busy:
        engine.step()
    expected = [answer_by_generate(model, one.prompt, adapted=one.adapted) for one in asked]
    assert answers(asked) == expected
    assert {one.finish_reason for one in asked} <= {"stop", "length"}


@pytest.mark.parametrize(
    "config", [BloomConfig, GPTNeoXConfig, OPTConfig], ids=["positions by the mask", "rotary", "a table of positions"]
)
def test_models_without_fused_layers_answer_batch_by_batch(config):
    changes = {OPTConfig: {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 36}}.get(config, {})
    model = make_unfused(config, **changes)
    engine = Engine(model, STOPS, max_batch=3)
    asked = [engine.submit(prompt, TWELVE, number != 3) for number, prompt in enumerate(make_prompts((9, 1, 23, 14)))]
    while engine.is_busy:
        engine.step()
    assert not model.training
    assert answers(asked) == [answer_by_generate(model, one.prompt, adapted=one.adapted) for one in asked]


def test_beyond_a_sliding_window_the_models_own_layers_answer(log):
    model = make_model("mistral", sliding_window=8).eval()
    (prompt,) = make_prompts((20,))
    expected = answer_by_generate(model, prompt)
    assert answers(Engine(model, STOPS, max_tokens=48).run([prompt], TWELVE)) == [expected]
    assert "sliding_window=8 is shorter than" in "".join(log)
    assert Engine(model, STOPS).room == 8, "as long as nothing is forgotten"


def test_an_adapter_that_fused_layers_do_not_have_is_not_ignored(log):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()
    (prompt,) = make_prompts((9,))
    assert answers(Engine(model, STOPS).run([prompt], TWELVE)) == [answer_by_generate(model, prompt)]
    assert "the adapter changes lm_head" in "".join(log)


def test_an_adapter_may_be_on_some_layers_alone():
    model = make_model("llama", rank=16, targets=["q_proj", "v_proj", "down_proj"]).eval()
    prompts = make_prompts((9, 4))
    generations = Engine(model, STOPS, max_tokens=32).run(prompts, TWELVE)
    assert answers(generations) == [answer_by_generate(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("adapted", [True, False])
def test_weights_of_sixteen_bits_are_joined_in_place(adapted):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    model = get_peft_model(base, LoraConfig(r=16, target_modules=find_linear_names(base))) if adapted else base
    (prompt,) = make_prompts((9,))
    expected = answer_by_generate(model, prompt)
    assert answers(Engine(model, STOPS, max_tokens=32).run([prompt], TWELVE)) == [expected]
    attention = base.model.layers[0].self_attn
    parts = [
        getattr(part, "base_layer", part).weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert answer_by_generate(model, prompt) == expected, "the modules still compute with them"


def test_where_memory_is_short_four_bit_weights_are_dequantised_at_every_step(monkeypatch, log):
    model = make_model("llama", rank=16).eval()
    prompts = make_prompts((9, 4))
    monkeypatch.setattr(decoder, "free_memory", lambda device: 300_000)
    generations = Engine(model, STOPS, max_batch=2, max_tokens=32).run(prompts, TWELVE)
    assert "4-bit weights dequantised at every step, 2 conversations of at most 32 tokens" in "".join(log)
    assert re.search(r"whose cache takes [1-9]\d* MiB", "".join(log)), "not 0.00 GiB"
    Engine(model, STOPS, max_batch=1, max_tokens=32)
    assert ", 1 conversation of at most 32 tokens" in log[-1]
    assert answers(generations) == [answer_by_generate(model, prompt) for prompt in prompts]


def test_a_weight_of_another_type_is_used_rounded_and_stays_as_it_is():
    layer = torch.nn.Linear(32, 16, bias=False)
    before = layer.weight.clone()
    with torch.no_grad():
        frozen = decoder.FrozenProjection(Projection([layer], torch.bfloat16, plain, 0), wide=True)
    assert frozen.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before)


def test_the_memory_is_that_of_the_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(decoder, "CONTAINER", limit)
    whole = decoder.free_memory(torch.device("cpu"))
    limit.write_text("max\n")
    assert decoder.free_memory(torch.device("cpu")) == whole
    limit.write_text("2000000\n")
    assert decoder.free_memory(torch.device("cpu")) == 1_000_000


@pytest.mark.parametrize("asked", [{"max_batch": 0}, {"max_tokens": 1}, {"vocab": 0}])
def test_an_engine_of_nothing_is_refused(asked):
    ((name, value),) = asked.items()
    with pytest.raises(ArgumentError, match=f"{name} is {value}; expected at least"):
        Engine(make_model("llama"), STOPS, **asked)


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_the_model_does_not_have_is_refused(token):
    engine = Engine(make_model("llama").eval(), STOPS, max_tokens=32)
    with pytest.raises(DataError, match=f"the token {token} is none of the model's 97"):
        engine.submit([5, token])


def test_a_model_of_own_layers_has_room_for_as_many_tokens_as_it_was_made_for():
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20_000,
    )
    assert Engine(AutoModelForCausalLM.from_config(config), STOPS).room == 20_000


def test_a_common_beginning_is_computed_once(computed):
    model = make_model("chatglm").eval()
    prompts = make_prompts((5, 7, 3), beginning=range(10, 50))
    engine = Engine(model, STOPS, max_batch=4, max_tokens=64)
    generations = engine.run(prompts, TWELVE)
    assert computed[:2] == [[45], [7, 3]], "the second and third wait for the first"
    assert [generation.cached for generation in generations] == [0, 40, 40]
    assert answers(generations) == [answer_by_generate(model, prompt) for prompt in prompts]

    (again,) = engine.run([prompts[1]], TWELVE)
    assert again.cached == 46, "all but the last, whose logits are needed"
    assert again.tokens == generations[1].tokens
    base = engine.submit(prompts[1], TWELVE, adapted=False)
    engine.step()
    assert base.cached == 0, "the base has other keys and values"


def test_a_conversation_goes_on_where_it_is_and_the_oldest_is_overwritten(computed):
    model = make_model("llama").eval()
    first, second, third = make_prompts((9, 8, 7))
    engine = Engine(model, (), max_batch=2, max_tokens=64)
    one, two = engine.run([first, second], Sampling(max_new_tokens=3))
    places = engine.running.slots
    assert [slot.tokens for slot in places] == [first + one.tokens[:2], second + two.tokens[:2]]
    (more,) = engine.run([[*second, *two.tokens, 9, 9]], Sampling(max_new_tokens=3))
    assert more.cached == len(second) + 2, "the last token of an answer is never read"
    assert [slot.tokens for slot in places] == [first + one.tokens[:2], more.prompt + more.tokens[:2]]
    engine.run([third], Sampling(max_new_tokens=1))
    assert [slot.tokens for slot in places] == [third, more.prompt + more.tokens[:2]]


def test_a_long_prompt_is_read_in_chunks_while_others_are_answered(computed, monkeypatch):
    monkeypatch.setitem(slots.CHUNK, "cpu", 8)
    model = make_model("qwen3").eval()
    prompts = make_prompts((3, 20))
    generations = Engine(model, (), max_batch=2, max_tokens=64).run(prompts, Sampling(max_new_tokens=5))
    assert computed[:6] == [[3, 5], [8], [1], [7], [1], [1, 1]]
    assert answers(generations) == [(answer_by_generate(model, prompt, 5)[0], None) for prompt in prompts]


def test_a_cancelled_answer_ends_and_its_place_is_free():
    model = make_model("llama").eval()
    prompts = make_prompts((6, 6, 6))
    engine = Engine(model, (), max_batch=1, max_tokens=32)
    running, waiting, last = (engine.submit(prompt, TWELVE) for prompt in prompts)
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    assert engine.step() == [last]
    assert (running.finish_reason, len(running.tokens)) == ("cancelled", 1)
    assert (waiting.finish_reason, waiting.tokens) == ("cancelled", [])
    while engine.is_busy:
        engine.step()
    engine.cancel(last)
    assert last.finish_reason == "length"


@pytest.mark.parametrize("fused", [True, False])
def test_prompts_without_room_are_refused_and_answers_end_at_it(fused):
    model = make_model("llama").eval() if fused else make_unfused(GPTNeoXConfig)
    engine = Engine(model, (), max_batch=2, max_tokens=16)
    assert engine.room == 16
    for length, words in ((0, "it has no tokens"), (16, "it has 16 tokens, and a conversation has room for 16")):
        with pytest.raises(DataError, match=words):
            engine.submit([9] * length)
    (generation,) = engine.run([[9] * 14])
    assert (len(generation.tokens), generation.finish_reason) == (2, "length")


def test_tokens_without_a_piece_are_never_chosen():
    model = make_model("llama").eval()
    prompts = make_prompts((9, 4, 11))
    free = Engine(model, (), max_tokens=48).run(prompts, TWELVE)
    bound = Engine(model, (), max_tokens=48, vocab=40).run(prompts, TWELVE)
    assert max(token for one in free for token in one.tokens) >= 40
    assert max(token for one in bound for token in one.tokens) < 40


def test_the_head_has_rows_that_a_card_multiplies_well():
    for vocab, rows in ((33, 64), (65, 97)):  # the model has 97
        made = Engine(make_model("llama").eval(), (), max_tokens=48, vocab=vocab).running.decoder
        assert len(made.head) == rows
        assert made([Part(0, 0, [1, 2])]).shape == (1, vocab)


@pytest.mark.parametrize("fused", [True, False])
def test_an_answer_that_has_ended_or_was_left_is_not_held(fused):
    engine = Engine(make_model("llama").eval() if fused else make_unfused(GPTNeoXConfig), (), max_tokens=48)
    ended = [weakref.ref(generation) for generation in engine.run(make_prompts((9, 4)), Sampling(3, logprobs=5))]
    left = engine.submit([9, 8], Sampling(3))
    engine.step()
    engine.cancel(left)
    ended.append(weakref.ref(left))
    del left
    assert [one() for one in ended] == [None] * 3


def test_a_seed_draws_the_same_answer_beside_any_others():
    model = make_model("glm").eval()
    prompts = make_prompts((9, 4, 17, 6))
    ways = [Sampling(12, temperature=1.5, seed=3), TWELVE, Sampling(12, 0.7, 0.9, 20, seed=3), Sampling(12, 2.0)]
    ways.append(Sampling(12, temperature=1.5, seed=-3))
    prompts.append(prompts[0])

    def run(asked):
        engine = Engine(model, STOPS, max_batch=3, max_tokens=48)
        generations = [engine.submit(prompts[number], ways[number]) for number in asked]
        while engine.is_busy:
            engine.step()
        return dict(zip(asked, answers(generations), strict=True))

    together = run([0, 1, 2, 3])
    assert together[0] != run([4])[4], "a seed with another sign"
    for number in (0, 1, 2):
        assert run([number])[number] == together[number]
    assert together[0] != answer_by_generate(model, prompts[0])
    assert run([3])[3] != together[3], "without a seed each draw is another"


def test_each_token_of_an_answer_has_its_probability_and_the_stop_token_has_none():
    model = make_model("chatglm").eval()
    (prompt,) = make_prompts((9,))
    tokens, _ = answer_by_generate(model, prompt)
    last = tokens[-1]
    (answer,) = Engine(model, {last}, max_batch=3, max_tokens=48).run([prompt], Sampling(12, logprobs=2))
    assert (answer.tokens, answer.stop_id) == (tokens[: tokens.index(last)], last)
    assert [one.top[0][0] for one in answer.logprobs] == answer.tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert answer.logprobs[0].chosen == pytest.approx(logits[tokens[0]].item(), abs=1e-4)


def test_conversations_that_come_and_go_in_any_order_are_those_of_generate():
    model = make_model("chatglm").eval()
    engine = Engine(model, STOPS, max_batch=3, max_tokens=64)
    draw = random.Random(2)
    beginnings = [make_prompts((length,), seed=length)[0] for length in (0, 33, 40)]
    asked = []
    for turn in range(200):
        if turn < 60 and draw.random() < 0.4:
            prompt = [*draw.choice(beginnings), *make_prompts((draw.randint(1, 9),), seed=turn)[0]]
            if asked and draw.random() < 0.3:  # an earlier conversation goes on
                prompt = [*draw.choice(asked).prompt, *prompt][:50]
            asked.append(engine.submit(prompt, Sampling(max_new_tokens=draw.randint(1, 8))))
        engine.step()
    assert len(asked) == 23
    assert sum(one.cached for one in asked) > 300
    for one in asked:
        assert (one.tokens, one.stop_id) == answer_by_generate(model, one.prompt, one.sampling.max_new_tokens)


def test_a_graph_is_given_what_a_forward_is_given(monkeypatch):
    """Graphs need a card. Here their forward runs at once, by the places that flash attention would read."""

    class Eager(Graph):
        def record(self):
            self.logits = self.forward()

        def replay(self, values):
            self.values.copy_(values)
            return self.forward()

    def attend(self, query, places, scale):
        sizes = places.ends.diff().tolist()
        spans = list(zip(sizes, places.starts[:-1].tolist(), places.lengths.tolist(), strict=True))
        return PlainCache.attend(self, query, places._replace(spans=spans), scale)

    monkeypatch.setattr(decoder, "Graph", Eager)
    monkeypatch.setattr(FlashCache, "attend", attend)
    model = make_model("chatglm").eval()
    prompts = make_prompts((9, 4, 17), seed=1)
    engine = Engine(model, STOPS, max_batch=5, max_tokens=48)
    inner = engine.running.decoder
    inner.is_flash, inner.pool = True, None
    inner.cache[:, :, -1] = 0
    for layers in inner.layers.values():
        for layer in layers:
            layer.attention.__class__ = FlashCache
    asked = [engine.submit(prompt, Sampling(12 - 3 * number)) for number, prompt in enumerate(prompts)]
    while engine.is_busy:  # three go by the graph of four, whose unused place must not be the first slot
        engine.step()
    limits = [one.sampling.max_new_tokens for one in asked]
    assert answers(asked) == [answer_by_generate(model, *one) for one in zip(prompts, limits, strict=True)]
    assert len(asked[0].tokens) == 12
    assert {size for size, _ in inner.graphs} == {1, 2, 4}
    assert inner.cache[:, :, -1].abs().sum() > 0


def test_cache_and_graphs_are_freed_with_their_engine(monkeypatch):
    monkeypatch.setattr(Graph, "record", lambda self: None)
    engine = Engine(make_model("chatglm").eval(), STOPS, max_batch=1, max_tokens=16)
    freed = weakref.ref(inner := engine.running.decoder)
    inner.graphs[1, True] = Graph(inner, 1, True)
    gc.disable()  # which would free a circle, too, but late
    try:
        del engine, inner
        assert freed() is None
    finally:
        gc.enable()


def test_a_cache_is_as_large_as_memory_and_model_allow():
    assert fit_cache(100_000, 16, None, 4096) == (16, 4096)
    assert fit_cache(50_000, 16, None, 4096) == (16, 3125)
    assert fit_cache(20_000, 16, None, 4096) == (9, 2048), "rather fewer than shorter ones"
    assert fit_cache(500, 16, None, 4096) == (1, 500)
    assert fit_cache(20_000, 16, 5000, 8192) == (4, 5000)
    for tokens in (4999, -1):
        with pytest.raises(ArgumentError, match=f"5000 tokens: the free memory holds .* {max(tokens, 0)};"):
            fit_cache(tokens, 16, 5000, 8192)


def test_the_common_beginning_of_two_prompts():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 3
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
