"""An exported tokenizer gives every text the ids that ChatGLM's own gives it."""

import copy
import json
import random
import struct
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from component.chatglm import ChatGLMTokenizer
from component.export import tokenizer as room
from component.export.tokenizer import build_tokenizer, export_template, stop_ids, write_tokenizer
from component.run.errors import ArgumentError
from script.make_tiny_model import train_tokenizer
from tests.conftest import TEXT, read_jsonl

from .texts import pieces_of, random_chat, random_text


def exported(tokenizer: ChatGLMTokenizer, folder: Path):
    folder.mkdir(exist_ok=True)
    write_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def real(exported_chatglm3):
    return exported_chatglm3


def differing(ours: ChatGLMTokenizer, built: Tokenizer, texts: list[str]) -> list[str]:
    """Texts that have other ids."""
    encoded = built.encode_batch(texts, add_special_tokens=False)
    return [text for text, found in zip(texts, encoded, strict=True) if found.ids != ours.tokenizer.encode(text)]


def test_golden_texts_have_the_official_ids(real, real_tokenizer, reference):
    rows = read_jsonl(reference / "golden/chatglm3_tokenizer.jsonl")
    for row in rows:
        assert real(row["text"], split_special_tokens=True)["input_ids"] == row["input_ids"]
        bare = real(row["text"], split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert bare == row["input_ids_no_special"]
        assert real.decode(bare) == row["decoded"]
        assert real.decode(row["user_message"]) == row["decoded_message"]
    assert len(rows) == 31


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_texts_have_the_same_ids(real, real_tokenizer, count):
    rng = random.Random(count)
    pieces = pieces_of(real_tokenizer)
    texts = [random_text(rng, pieces) for _ in range(count)]
    assert not differing(real_tokenizer, real.backend_tokenizer, texts)
    for text in texts[:2000]:
        ids = real_tokenizer.tokenizer.encode(text)
        assert real.decode(ids) == real_tokenizer.decode(ids)


def spm(folder: Path, **options) -> ChatGLMTokenizer:
    """A SentencePiece model trained with other options than ChatGLM's."""
    settings = {"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"hard_vocab_limit": False, "remove_extra_whitespaces": False, "character_coverage": 1.0} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), minloglevel=2, **settings
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vocab_size": 420, "allow_whitespace_only_pieces": True},
        {"byte_fallback": False, "vocab_size": 100},
    ],
    ids=["bpe", "with runs of spaces", "without bytes"],
)
def test_other_sentencepiece_models_have_the_same_ids(tmp_path, options):
    ours = spm(tmp_path, **options)
    rng = random.Random(0)
    texts = [random_text(rng, pieces_of(ours)) for _ in range(500)]
    assert not differing(ours, build_tokenizer(ours), texts)


def test_the_demos_model_has_the_same_ids(tiny_tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng, pieces_of(tiny_tokenizer)) for _ in range(500)]
    assert not differing(tiny_tokenizer, build_tokenizer(tiny_tokenizer), texts)


@pytest.mark.parametrize("options", [{"normalization_rule_name": "nfkc"}, {"add_dummy_prefix": False}])
def test_a_model_that_changes_texts_is_refused(tmp_path, options):
    with pytest.raises(ArgumentError, match=r"tokenizer\.model: in tokenizer\.json, '.*' would have the ids .* take a"):
        write_tokenizer(spm(tmp_path, **options), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_model_that_is_no_bpe_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="SentencePiece model is no BPE; take a SentencePiece model of ChatGLM's"):
        write_tokenizer(spm(tmp_path, model_type="unigram", vocab_size=310), tmp_path)


def test_a_piece_with_the_name_of_a_control_token_is_refused(tmp_path):
    odd = spm(tmp_path, user_defined_symbols=["<sop>"])
    with pytest.raises(ArgumentError, match="'<sop>' is one of its pieces; take a SentencePiece model"):
        write_tokenizer(odd, tmp_path)


def with_unused_piece(ours: ChatGLMTokenizer, folder: Path) -> ChatGLMTokenizer:
    """The tokenizer with its last piece marked as unused."""
    pieces = ours.tokenizer.sp_model
    last = pieces.get_piece_size() - 1
    name = pieces.id_to_piece(last).encode()
    entry = b"\n" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", pieces.get_score(last))
    model, was = Path(ours.vocab_file).read_bytes(), bytes([len(entry)]) + entry
    assert model.count(was) == 1
    (folder / "tokenizer.model").write_bytes(model.replace(was, bytes([len(entry) + 2]) + entry + b"\x18\x05"))
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


def test_pieces_that_no_training_made_are_refused(tmp_path):
    """SentencePiece finds them before all others, or takes them apart again, which no order of merges does."""
    for odd in (spm(tmp_path, user_defined_symbols=["北zq"]), with_unused_piece(spm(tmp_path), tmp_path)):
        with pytest.raises(ArgumentError, match="it has unused pieces, or some that a user defined; take"):
            write_tokenizer(odd, tmp_path)


def test_added_tokens_are_carried(tiny_tokenizer, tmp_path):
    ours = copy.deepcopy(tiny_tokenizer)
    ours.add_tokens(["<think>", "天气"])
    ours.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs = exported(ours, tmp_path)
    for text in ("<think>北京天气 a<|tool|>b", "天天气气", "<think><|tool|>"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.decode(ours("a<|tool|><think>")["input_ids"], skip_special_tokens=True) == "a<think>"


def test_it_pads_on_the_left_and_opens_as_chatglm(real, real_tokenizer):
    batch = ["你好", "Hello, people of philosophy"]
    ours, theirs = real_tokenizer(batch, padding=True), real(batch, padding=True)
    assert theirs.keys() == {"input_ids", "attention_mask"}
    assert {key: theirs[key] for key in theirs} == {key: ours[key] for key in theirs}
    assert real("你好", "people")["input_ids"] == real_tokenizer("你好", "people")["input_ids"]
    assert (real.eos_token, real.pad_token, real.unk_token) == ("</s>", "<unk>", "<unk>")
    assert not real.clean_up_tokenization_spaces


def test_control_tokens_in_a_text_become_control_tokens_as_the_docstring_says(real):
    assert 64795 in real("a<|user|>")["input_ids"]
    assert 64795 not in real("a<|user|>", split_special_tokens=True)["input_ids"]
    assert "becomes that control token" in write_tokenizer.__doc__
    answer = real("a", add_special_tokens=False)["input_ids"]
    assert real.decode([64790, 64792, 64796, *answer], skip_special_tokens=True) == "a"


def test_answers_end_and_chats_are_written_as_the_version_has_them(tiny_tokenizer, tmp_path):
    user, result = map(tiny_tokenizer.get_command, ("<|user|>", "<|observation|>"))
    for version, ids in ((3, [2, user, result]), (2, [2])):
        ours = copy.deepcopy(tiny_tokenizer)
        ours.chatglm_version = version
        assert stop_ids(ours) == ids
        assert exported(ours, tmp_path).chat_template == export_template(version)


@pytest.mark.parametrize("text", ["philosophy", " " * 10, "\t" * 10], ids=["one word", "spaces", "bytes"])
def test_the_cost_is_about_linear_in_the_text(real, real_tokenizer, text):
    def seconds(count: int) -> float:
        start = time.process_time()
        ids = real.backend_tokenizer.encode(text * count, add_special_tokens=False).ids
        passed = time.process_time() - start
        assert ids == real_tokenizer.tokenizer.encode(text * count)
        return passed

    assert seconds(16_000) < 8 * max(seconds(4000), 0.001)


PLAIN = """if True:
    import importlib.util, json, sys
    from transformers import AutoTokenizer
    assert importlib.util.find_spec("component") is None
    tokenizer, job = AutoTokenizer.from_pretrained(sys.argv[1]), json.load(sys.stdin)
    texts = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in job["texts"]]
    batch = dict(tokenizer(["你好", "Hello, world!"], padding=True))
    ask = {"return_dict": True, "return_assistant_tokens_mask": True}
    chats = [dict(tokenizer.apply_chat_template(row["messages"], row["tools"], **ask)) for row in job["chats"]]
    print(json.dumps([texts, batch, chats]))
"""


def in_plain_transformers(folder: Path, texts: list[str], chats: list[dict]) -> list:
    """What transformers makes of them where this project is not installed."""
    command = [sys.executable, "-I", "-c", PLAIN, str(folder)]
    job = json.dumps({"texts": texts, "chats": chats})
    return json.loads(subprocess.run(command, cwd="/", input=job, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["exported", "merged"])
def test_plain_transformers_reads_the_same_ids(real_tokenizer, reference, tmp_path, beside):
    """Also from a merged folder, whose other files name a tokenizer that transformers does not have."""
    if beside:
        real_tokenizer.save_pretrained(tmp_path)
        config = json.loads((reference / "chatglm3-6b/config.json").read_text())
        config.pop("auto_map")
        (tmp_path / "config.json").write_text(json.dumps(config))
        room.write_tokenizer_json(real_tokenizer, tmp_path)
    else:
        write_tokenizer(real_tokenizer, tmp_path)
    rng = random.Random(3)
    pieces = pieces_of(real_tokenizer)
    texts = [random_text(rng, pieces) for _ in range(300)]
    chats = [random_chat(rng, pieces) for _ in range(100)]
    found, batch, written = in_plain_transformers(tmp_path, texts, chats)
    assert found == [real_tokenizer(text)["input_ids"] for text in texts]
    assert batch["input_ids"] == real_tokenizer(["你好", "Hello, world!"], padding=True)["input_ids"]
    for row, chat in zip(chats, written, strict=True):
        assert chat["input_ids"] == [*real_tokenizer.apply_chat_template(**as_ours(row), return_dict=False), 2]
    assert any(chain.from_iterable(chat["assistant_masks"] for chat in written))


def as_ours(row: dict) -> dict:
    return {"conversation": row["messages"], "tools": row["tools"]}


def test_the_demos_tokenizer_is_written(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"conversation": [{"human": text, "assistant": text}]} for text in TEXT]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours = train_tokenizer([data], tmp_path, vocab_size=340)
    theirs = exported(ours, tmp_path / "out")
    assert theirs("Hello, world!")["input_ids"] == ours("Hello, world!")["input_ids"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert "auto_map" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
