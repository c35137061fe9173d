"""What llama.cpp itself makes of our GGUF files: the ids, greedy tokens and prompts of our own model."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from component.export.gguf import KINDS, write_gguf, write_gguf_adapter
from component.export.merge import merged_model
from component.export.weights import ChatGLMWeights
from component.model import open_tokenizer
from component.trust import check_adapter
from component.verify.llama_cpp import answers, chat, continuation, encoding, template

from ...conftest import read_jsonl

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; make test-slow installs it")
pytestmark = pytest.mark.slow

LENGTH = 32
WORDS = [
    *"ab 1\n\t.,好天气<>/s|▁é😀\u200d\u0301[]P{}\"'",
    "</s>",
    "<s>",
    "<unk>",
    "<eos>",
    "  ",
    "<|user|>",
    "sop",
    "eop",
]
WORDS += ["of", "the", "中国", "<0x41>", "tool_call(", "[gMASK]", "[PAD64799]", "\r\n", "\x00", "\u3000"]
PLANES = ((1, 0x24F), (0x300, 0xD7FF), (0x4E00, 0x9FFF), (0xE000, 0xFFFF), (0x1F300, 0x1F6FF), (0x10000, 0x10FFFF))


def odd_texts() -> list[str]:
    chance = random.Random(0)
    mixed = ["".join(chance.choices(WORDS, k=chance.randint(1, 30))) for _ in range(3000)]
    wild = [
        "".join(chr(chance.randint(*chance.choice(PLANES))) for _ in range(chance.randint(1, 30))) for _ in range(2000)
    ]
    return ["", *WORDS, *mixed, *wild]


def export(base, file, kind="f32", plan=None, tokenizer=None):
    write_gguf(ChatGLMWeights(str(base), torch.float32, plan), tokenizer or open_tokenizer(str(base)), file, kind)
    return file


def greedy(model, prompt: list[int], stops=(2,), length=LENGTH) -> list[int]:
    asked = {"max_new_tokens": length, "do_sample": False, "eos_token_id": list(stops)}
    return model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory):
    """The tiny checkpoints under official names, each with the published tokenizer of its version; by version."""

    def make(version: int):
        folder = tmp_path_factory.mktemp(f"chatglm{version}")
        config = json.loads((reference / "modeling/chatglm3_chat/config.json").read_text())
        config |= {"_name_or_path": f"THUDM/chatglm{version}-6b"}
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("modeling/chatglm3_chat/model.safetensors", f"chatglm{version}-6b/tokenizer.model"):
            (folder / file.rpartition("/")[2]).write_bytes((reference / file).read_bytes())
        settings = (reference / f"chatglm{version}-6b/tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(settings)
        return folder

    return {version: make(version) for version in (2, 3)}


@pytest.fixture(scope="module")
def files(published, tmp_path_factory):
    """Their GGUF files in float32, by version."""
    folder = tmp_path_factory.mktemp("gguf")
    return {version: export(base, folder / f"chatglm{version}.gguf") for version, base in published.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_llama_cpp_gives_every_text_our_ids(published, files, version):
    ours = open_tokenizer(str(published[version])).tokenizer
    texts = odd_texts()
    found = answers(files[version], [encoding(text) for text in texts])
    assert len(texts) > 5000
    assert [answer["tokens"] for answer in found] == [ours.encode(text) for text in texts]


@pytest.mark.parametrize("version", [2, 3])
def test_llama_cpp_continues_the_rows_of_training_as_our_model(published, files, reference, version):
    rows = read_jsonl(reference / f"golden/chatglm{version}_sft.jsonl")
    prompts = [row["input_ids"][: len(row["input_ids"]) // 2 + 1] for row in rows if len(row["input_ids"]) < 900]
    model = AutoModelForCausalLM.from_pretrained(published[version], dtype=torch.float32).eval()
    stops = (2, 64795, 64797) if version == 3 else (2,)
    found = answers(files[version], [continuation(prompt, LENGTH) for prompt in prompts])
    assert len(prompts) >= 5
    assert [answer["tokens"] for answer in found] == [greedy(model, prompt, stops) for prompt in prompts]


SHAPES = {
    "plain": {},
    "one group": {"multi_query_group_num": 1},
    "as many groups as heads": {"multi_query_group_num": 4},
    "no groups": {"multi_query_attention": False},
    "32k": {"rope_ratio": 50.0, "seq_length": 32768},
    "rope_ratio 4": {"rope_ratio": 4.0},
    "rope_ratio 1.5": {"rope_ratio": 1.5},
    "no bias": {"add_qkv_bias": False},
    "large epsilon": {"layernorm_epsilon": 1e-2},
    "heads of 12": {"hidden_size": 48, "kv_channels": 12},
    "three heads of 20": {"hidden_size": 60, "num_attention_heads": 3, "kv_channels": 20, "multi_query_group_num": 3},
}


@pytest.fixture
def odd_model(tmp_path, tiny_tokenizer):
    """Makes a model of an odd shape whose every weight matters, and its folder."""

    def make(**changes):
        sizes = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
        torch.manual_seed(0)
        config = ChatGLMConfig(**{"padded_vocab_size": 448, "initializer_range": 0.3} | sizes | changes)
        model = ChatGLMForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean="norm" in name, std=0.3)
        model.save_pretrained(tmp_path / "odd")
        tiny_tokenizer.save_pretrained(tmp_path / "odd")
        return model, tmp_path / "odd"

    return make


def some_prompts(rows: int = 340) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(3, rows) for _ in range(length)] for length in (1, 7, 40, 150)]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_llama_cpp_computes_models_of_odd_shapes(odd_model, tmp_path, changes):
    model, folder = odd_model(**changes)
    stops = stops_of(folder)
    found = answers(export(folder, tmp_path / "odd.gguf"), [continuation(prompt, LENGTH) for prompt in some_prompts()])
    assert [answer["tokens"] for answer in found] == [greedy(model, prompt, stops) for prompt in some_prompts()]


def stops_of(folder) -> list[int]:
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    return [2, *map(tokenizer.get_command, ("<|user|>", "<|observation|>"))]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_from_every_kind_of_file(odd_model, tmp_path, kind):
    """The first token of a rounded model is not always ours, but its logits are near: it is among our best."""
    model, folder = odd_model()
    found = answers(export(folder, tmp_path / "odd.gguf", kind), [continuation(prompt, 1) for prompt in some_prompts()])
    for prompt, answer in zip(some_prompts(), found, strict=True):
        with torch.no_grad():
            best = model(torch.tensor([prompt])).logits[0, -1].topk(3 if kind != "f32" else 1).indices.tolist()
        assert answer["tokens"][0] in best


LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.mark.parametrize(
    ("lora", "shape"),
    [
        ({}, {}),
        ({"use_rslora": True}, {}),
        ({}, {"multi_query_attention": False}),
        ({"target_modules": ["word_embeddings"]}, {}),
        ({"target_modules": ["word_embeddings", "output_layer", *LAYERS], "use_rslora": True}, {}),
    ],
    ids=["layers", "rslora", "without groups", "the embedding", "everything"],
)
def test_an_adapter_on_its_bases_file_answers_as_the_merged_model(odd_model, adapter_folder, tmp_path, lora, shape):
    model, folder = odd_model(**shape)
    lora = {"task_type": "CAUSAL_LM", "target_modules": LAYERS, "lora_alpha": 16} | lora
    adapter = adapter_folder(folder, init_lora_weights=False, **lora)
    write_gguf_adapter(adapter, check_adapter(adapter), model.config, tmp_path / "lora.gguf")
    merged = merged_model(str(folder), adapter, "full", "float32").eval()
    asked = [continuation(prompt, LENGTH) for prompt in some_prompts()]
    file = export(folder, tmp_path / "base.gguf")
    found = [answer["tokens"] for answer in answers(file, asked, lora=tmp_path / "lora.gguf")]
    assert found == [greedy(merged, prompt, stops_of(folder)) for prompt in some_prompts()]
    assert found != [answer["tokens"] for answer in answers(file, asked)]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": '查询天气 "now"',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"name": "get_weather", "arguments": json.dumps({"city": "北\"京'", "days": 2, "ok": True, "x": [1.5, None]})}
CHATS = {
    "one question": ([{"role": "user", "content": "你好"}], None),
    "system prompt": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": " a  b\n"}], None),
    "three rounds": ([{"role": ("user", "assistant")[i % 2], "content": f"{i} ok"} for i in range(5)], None),
    "functions": ([{"role": "user", "content": "北京天气"}], [WEATHER]),
    "a call and its result": (
        [
            {"role": "user", "content": "北京天气"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": CALL}]},
            {"role": "tool", "tool_call_id": "a", "content": '{"sky": "晴"}'},
        ],
        [WEATHER],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_the_embedded_template_writes_the_prompt_of_training(published, files, name):
    messages, tools = CHATS[name]
    options = {"tools": tools} if tools else {}
    prompt = answers(files[3], [template(messages, **options)], parses=False)[0]["prompt"]
    ids = answers(files[3], [encoding(prompt, special=True)])[0]["tokens"]
    ours = open_tokenizer(str(published[3]))
    assert ids == ours.apply_chat_template(messages, tools, add_generation_prompt=True, return_dict=False)


def test_the_embedded_template_of_chatglm2_counts_its_rounds(published, files):
    """An earlier answer is encoded apart and ends on EOS, as training renders it."""
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    prompt = answers(files[2], [template(messages)], parses=False)[0]["prompt"]
    ids = answers(files[2], [encoding(prompt, special=True)])[0]["tokens"]
    encode = open_tokenizer(str(published[2])).tokenizer.encode
    first, second = encode("[Round 1]\n\n问：一\n\n答："), encode("[Round 2]\n\n问：三\n\n答：")
    assert ids == [64790, 64792, *first, *encode("二"), 2, *second]


def test_a_chat_answers_as_our_model_and_html_stays_text(published, files):
    messages = [{"role": "user", "content": "<s>alt</s> philosophy"}]
    ours = open_tokenizer(str(published[3]))
    prompt = ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(published[3], dtype=torch.float32).eval()
    answer = answers(files[3], [chat(messages, LENGTH)], parses=False)[0]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    wanted = greedy(model, prompt, (2, 64795, 64797))
    assert answer["choices"][0]["message"]["content"] == ours.decode(wanted).strip()


def test_a_learned_call_comes_back_as_text_where_the_server_does_not_look_for_calls(published, tmp_path):
    """Where it does, it derives another way of writing calls from the template, and answers with an error."""
    folder = shutil.copytree(published[3], tmp_path / "chatglm3")
    tokenizer = open_tokenizer(str(folder))
    question = [{"role": "user", "content": "北京天气"}]
    prompt = tokenizer.apply_chat_template(question, [WEATHER], add_generation_prompt=True, return_dict=False)
    call = "get_weather\n ```python\ntool_call(city='北京')\n```"
    learned = [*tokenizer.tokenizer.encode(call), tokenizer.get_command("<|observation|>")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teach(model, prompt, learned)
    model.eval().save_pretrained(folder)
    file = export(folder, tmp_path / "tuned.gguf")
    asked = chat(question, tools=[WEATHER])
    plain, found = answers(file, [continuation(prompt, 64), asked], parses=False)
    assert plain["tokens"] == greedy(model, prompt, (2, 64795, 64797), 64) == learned
    assert found["choices"][0]["message"]["content"] == call
    assert answers(file, [asked])[0]["error"]["code"] == 500


def teach(model, prompt: list[int], answer: list[int]) -> None:
    """Train every weight until the model gives one answer."""
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:]).backward()
        optimizer.step()
