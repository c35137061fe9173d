"""vLLM reads ChatGLM3's answers by the file that is written into exports, as we read them."""

import ast
import gzip
import inspect
import json
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from component.chatglm.prompt import call_message
from component.export.tool_parser import write_tool_parser
from component.inference import calls
from component.inference.calls import Call, Thought, read_messages
from component.inference.session import Session
from tests.component.export.vllm_stub import NEW, OLD, StructuredOutputsParams, install, request, stream
from tests.conftest import read_jsonl

PARTING = "<|assistant|>"
WEATHER = "get_weather\n ```python\ntool_call(city='北京', days=2)\n```"
TOLD = ("get_weather", {"city": "北京", "days": 2})
DEEP = "[" * 101 + "]" * 101
ANSWERS = {  # what the model writes: its text and its calls
    "": ("", []),
    "\n 你好！": ("你好！", []),
    "你好": ("你好", []),  # which could be a name
    "\n two\n\n lines \n": ("two\n\n lines", []),
    "\n 1 < 2 and <|assist is no token": ("1 < 2 and <|assist is no token", []),
    "\n ends with <|assis": ("ends with <|assis", []),
    WEATHER: ("", [TOLD]),
    f" {WEATHER}\n": ("", [TOLD]),
    f"\n I look.{PARTING} {WEATHER}": ("I look.", [TOLD]),
    f"\n I look.{PARTING}{WEATHER}{PARTING}{WEATHER}": ("I look.", [TOLD, TOLD]),
    f"{WEATHER}{PARTING}\n Done.{PARTING}\n": ("Done.", [TOLD]),
    f"\n <think>\nwhy\n</think>\n\nso{PARTING}{WEATHER}": ("<think>\nwhy\n</think>\n\nso", [TOLD]),
    "now\n```\ntool_call()\n```": ("", [("now", {})]),
    "f.g-h\n```python\nf.g(a='```\\n', b='''\n```''')\n```": ("", [("f.g-h", {"a": "```\n", "b": "\n```"})]),
    "f\n```python\ntool_call(t=(1, 'x'), d={1: None}, n=-0.5, s='<|assistant', k=[True])\n```": (
        "",
        [("f", {"t": [1, "x"], "d": {"1": None}, "n": -0.5, "s": "<|assistant", "k": [True]})],
    ),
    # The word, written within a call.
    f"f\n```python\nf(s='{PARTING}', t='a{PARTING} b')\n```": ("", [("f", {"s": PARTING, "t": f"a{PARTING} b"})]),
    f"\n See.{PARTING}f\n```\nf(s='```{PARTING}')\n``` \n{PARTING}\n So.": (
        "See.\nSo.",
        [("f", {"s": f"```{PARTING}"})],
    ),
    # No calls.
    f"f\n```\nf(s='{PARTING}{WEATHER}{PARTING}\n So.": ("f\n```\nf(s='\nSo.", []),
    f"f\n```\nf(s='{PARTING}\n So.{PARTING}": ("f\n```\nf(s='\nSo.", []),
    "f\n```python\ntool_call(a=1e999)\n```": ("f\n```python\ntool_call(a=1e999)\n```", []),
    "f\n```python\ntool_call(a={1})\n```": ("f\n```python\ntool_call(a={1})\n```", []),
    "f\n```python\ntool_call(a='\\ud800')\n```": ("f\n```python\ntool_call(a='\\ud800')\n```", []),
    f"f\n```python\ntool_call(a={DEEP})\n```": (f"f\n```python\ntool_call(a={DEEP})\n```", []),
    "f\n```python\ntool_call(a=x)\n```": ("f\n```python\ntool_call(a=x)\n```", []),
    "f\n```python\ntool_call(a=1, a=2)\n```": ("f\n```python\ntool_call(a=1, a=2)\n```", []),
    "f\n```python\ntool_call(1)\n```": ("f\n```python\ntool_call(1)\n```", []),
    "f\n```python\nprint(1); x\n```": ("f\n```python\nprint(1); x\n```", []),
    "f\n```python\n(lambda: 1)()\n```": ("f\n```python\n(lambda: 1)()\n```", []),
    "f\n```python\n```": ("f\n```python\n```", []),
    "a name\n```python\ntool_call()\n```": ("a name\n```python\ntool_call()\n```", []),
    "get_weather\n ```python\ntool_call(city='北": ("get_weather\n ```python\ntool_call(city='北", []),
    "get_weather\n": ("get_weather", []),
    "Title\n`code` follows": ("Title\n`code` follows", []),
    f"a title\nand more{PARTING}{WEATHER}": ("a title\nand more", []),  # nothing is called where one is no call
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_tool_parser(folder)
    return folder / "chatglm3_tool_parser.py"


@pytest.fixture(params=[OLD, NEW])
def make_parser(request, file, monkeypatch):
    """Makes parsers of the file, as vLLM loads it. Their tokenizer is a tiny one."""

    class Tokenizer:
        def get_vocab(self):
            return {"</s>": 2, "<|user|>": 9, PARTING: 6, "<|observation|>": 7}

    manager = install(monkeypatch, request.param)
    manager.import_tool_parser(str(file))
    return lambda: manager.tool_parsers["chatglm3"](Tokenizer())


def unstreamed(parser, text, **fields) -> tuple:
    found = parser.extract_tool_calls(text, request(**fields))
    assert found.tools_called == bool(found.tool_calls)
    functions = [call.function for call in found.tool_calls]
    return found.content or "", [(function.name, json.loads(function.arguments)) for function in functions]


def streamed(parser, pieces, **fields) -> tuple:
    """Ends as a model ends its answer: with a token that has no text."""
    message = stream(parser, [*((piece, [1]) for piece in pieces), ("", [9])], request(**fields))
    assert message["finish_reason"] == ("tool_calls" if message["calls"] else "stop")
    assert len({call["id"] for call in message["calls"]}) == len(message["calls"])
    return message["content"], [(call["name"], json.loads(call["arguments"])) for call in message["calls"]]


def says_end(parser) -> bool:
    """Whether this vLLM says when a stream ends, and takes a call in its last piece."""
    return hasattr(parser, "tools")


def test_the_file_has_our_reading_word_for_word_and_imports_nothing_of_ours(file):
    text = file.read_text(encoding="utf-8")
    assert inspect.getsource(calls) in text
    names = set()
    for node in ast.walk(ast.parse(text)):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and node.level == 0 else set()
        assert not (isinstance(node, ast.ImportFrom) and node.level), "a relative import"
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"vllm"}


@pytest.mark.parametrize("text", ANSWERS, ids=lambda text: repr(text[:30]))
def test_an_answer_is_read_whole_and_while_it_grows(make_parser, text):
    expected = ANSWERS[text]
    assert unstreamed(make_parser(), text) == expected
    assert streamed(make_parser(), text) == expected, "character by character"
    for at in range(len(text) + 1):
        assert streamed(make_parser(), [text[:at], text[at:]]) == expected, (text[:at], text[at:])


def test_text_is_told_at_once_and_a_call_as_soon_as_vllm_can_take_it(make_parser):
    parser, told = make_parser(), []
    for letter in [*f"\n ab c{PARTING}{WEATHER}", ""]:
        delta = parser.extract_tool_calls_streaming("", "", letter, [], [], [1 if letter else 9], request())
        told.append(delta.content or ("call" if delta.tool_calls else ""))
    assert told[:6] == ["", "", "a", "b", "", " c"]
    assert set(told[6:-2]) == {""}
    assert told[-2:] == (["", "call"] if says_end(parser) else ["call", ""])


@pytest.mark.parametrize("cut", [WEATHER[:20], WEATHER[:-1], "你好"])
def test_a_truncated_answer_is_told_where_the_limit_of_tokens_ends_it(make_parser, cut):
    """A limit that the request names; from 0.25 on, vLLM says when the answer ends."""
    pieces = [(letter, [1]) for letter in cut]
    message = stream(make_parser(), pieces, request(max_tokens=len(cut)), "length")
    assert (message["content"], message["calls"], message["finish_reason"]) == (cut, [], "length")
    parser = make_parser()
    if says_end(parser):
        assert stream(parser, pieces, request(), "length")["content"] == cut


def test_a_call_in_the_last_piece_of_a_stream_is_told_once(make_parser):
    """Up to 0.13, vLLM drops its name, and up to 0.24 what else is in that piece."""
    parser = make_parser()
    if says_end(parser):
        (call,) = stream(parser, [(WEATHER, [1, 9])], request())["calls"]
        assert (call["name"], json.loads(call["arguments"])) == TOLD


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ("\nThat was it.", "That was it."),
        ("\n```python\ntool_call()\n```", "```python\ntool_call()\n```"),
        (f"{PARTING}f\n```\nf(x)\n```", "f\n```\nf(x)\n```"),
    ],
)
def test_a_call_is_none_where_the_model_goes_on_with_something_that_makes_it_none(make_parser, rest, text):
    """Before 0.25, a stream has told it already."""
    whole = (text if rest.startswith(PARTING) else WEATHER + rest), []
    assert unstreamed(make_parser(), WEATHER + rest) == whole
    assert streamed(make_parser(), WEATHER + rest) == (whole if says_end(make_parser()) else (text, [TOLD]))


def test_nothing_is_called_where_the_request_forbids_it(make_parser):
    text = f"\n See.{PARTING}{WEATHER}"
    expected = f"See.\n{WEATHER}", []
    assert unstreamed(make_parser(), text, tool_choice="none") == expected
    assert streamed(make_parser(), text, tool_choice="none") == expected


def test_special_tokens_are_shown_to_the_parser_where_functions_are_offered(make_parser):
    assert make_parser().adjust_request(request()).skip_special_tokens is False
    assert make_parser().adjust_request(request(tools=None, tool_choice="none")).skip_special_tokens is True
    assert make_parser().adjust_request(request(tool_choice="none")).skip_special_tokens is True


def named(name):
    return type("Tool", (), {"function": type("Function", (), {"name": name})})


@pytest.mark.parametrize(("choice", "names"), [("required", "get_weather|now\\?"), (named("now?"), "now\\?")])
def test_a_required_call_begins_as_the_model_writes_calls(make_parser, choice, names):
    asked = request(tools=[named("get_weather"), named("now?")], tool_choice=choice, response_format="json")
    made = make_parser().adjust_request(asked)
    if not says_end(make_parser()):  # vLLM itself asks for JSON then
        assert made.structured_outputs is None
        return
    form = rf" ?({names})\n ?```python\ntool_call\([^\n]*\)\n```"
    assert (made.structured_outputs, made.response_format) == (StructuredOutputsParams(regex=form), None)


def test_a_message_with_many_fences_is_read_as_a_call_a_few_times_only(make_parser, monkeypatch):
    parser = make_parser()
    tried, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: tried.append(args) or parse(*args, **kwargs))
    pieces = ["f\n```\nx = '''", *["\n```"] * 1000]
    assert streamed(parser, pieces) == ("".join(pieces), [])
    assert len(tried) == (1 if says_end(parser) else 21)


LONG = {  # how an answer begins, and what it repeats
    "text": ("\n ", "word " * 200),
    "call": ("f\n```\nf(a='", "word " * 200),
    "spaces": ("", " " * 1000),
    "spaces behind a name": ("f", " " * 1000),
    "lines behind a text": ("\n so", "\n" * 1000),
    "fences": ("f\n```\nf(a='", "\n```" + " " * 1000),
    "messages": ("", f"f\n```\nf(a='{PARTING}" * 3),
}


@pytest.mark.parametrize("begin, more", LONG.values(), ids=LONG)
def test_reading_takes_time_in_proportion_to_the_answer(make_parser, begin, more):
    def seconds(read, count):
        pieces, parser = [begin, *[more] * count], make_parser()
        start = time.process_time()
        read(parser, pieces)
        return time.process_time() - start

    def grow(parser, pieces):
        for piece in pieces:
            parser.extract_tool_calls_streaming("", "", piece, [], [], [1], asked)
        parser.extract_tool_calls_streaming("", "", "", [], [], [9], asked)

    asked = request()
    for read in (grow, lambda parser, pieces: parser.extract_tool_calls("".join(pieces), asked)):
        assert seconds(read, 1600) < 8 * min(seconds(read, 400) for _ in range(3)) + 0.02  # four times as long


def test_without_vllm_the_file_reads_an_answer(file):
    code = f"""if 1:
        import json, sys
        sys.path.insert(0, {str(file.parent)!r})
        from chatglm3_tool_parser import read_answer
        for answer in {[*ANSWERS]!r}:
            for stop in ("", "</s>", "<|user|>", "<|observation|>"):
                read = read_answer(answer + stop)
                print(json.dumps([read.text, read.calls, read.finish_reason]))"""
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    read = [(text, list(map(tuple, calls)), reason) for text, calls, reason in map(json.loads, run.stdout.splitlines())]
    assert read == [(*answer, "tool_calls" if answer[1] else "stop") for answer in ANSWERS.values() for _ in range(4)]


def answers_of(shared):
    """Answers that others recorded, and those that rows teach."""
    for row in read_jsonl(shared / "reference/golden/chatglm3_process_response.jsonl"):
        yield row["output"]
    for row in read_jsonl(shared / "data/toolalpaca_chatglm3.jsonl"):
        for turn in row["conversations"]:
            if turn["role"] == "assistant":
                yield f"\n {turn['content']}"
            elif turn["role"] == "tool":
                yield written(turn["name"], turn["parameters"])
    with gzip.open(shared / "data/snips/validate.jsonl.gz", "rt", encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            (call,) = row["messages"][1]["tool_calls"]
            yield written(call["function"]["name"], json.loads(call["function"]["arguments"]))


def written(name, parameters):
    message = call_message(name, parameters)
    return f"{message.metadata}\n {message.content}"


@pytest.fixture(scope="module")
def recorded(shared, real_tokenizer):
    """Of each answer its text, cut at every token where it is one of the first, and how our reader reads the tokens."""
    session, rows = Session(real_tokenizer, "chatglm3"), []
    parting, encode, decode = (
        real_tokenizer.get_command(PARTING),
        real_tokenizer.tokenizer.encode,
        real_tokenizer.decode,
    )
    for text in answers_of(shared):
        messages = list(map(encode, text.split(PARTING)))
        ids = [token for message in messages for token in (parting, *message)][1:]
        ours, text = session.read(ids), PARTING.join(map(decode, messages))
        grown = [decode(ids[:i]).rstrip("\ufffd") for i in range(1, len(ids))] if len(rows) < 60 else []
        ends = [0, *map(len, grown), len(text)]
        rows.append(([text[a:b] for a, b in pairwise(ends)], (ours.text, list(map(tuple, ours.calls)))))
    assert len(rows) == 767
    return rows


def test_recorded_answers_are_read_as_our_reader_reads_them(make_parser, recorded):
    for pieces, expected in recorded:
        assert unstreamed(make_parser(), "".join(pieces)) == expected
        assert streamed(make_parser(), pieces) == expected


def test_reasoning_is_told_apart_only_where_it_is_asked_for():
    messages = ["\n <think>\nwhy\n</think>\n\nso", "f\n```\nf()\n```"]
    assert read_messages(messages).text == "<think>\nwhy\n</think>\n\nso"
    answer = read_messages(messages, thought=Thought())
    assert (answer.text, answer.reasoning, answer.calls) == ("so", "why", (Call("f", {}),))
