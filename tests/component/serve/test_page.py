"""The page of the server: what its file keeps to, and in a real browser, where one is installed, what it does."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

from component.data.formats import parse_row
from component.data.page import fill_page
from tests.browser import CHROMIUM, Browser

from .conftest import wait_until
from .fake_server import BASE, TUNED, FakeServer, call, words

PAGE = Path(__file__).parents[3] / "component/serve/page.html"
MAY = "; connect-src 'self'"
HOSTILE = "</script><img src=x onerror=\"window.broken = 1\"><a href='javascript:broken=1'>\u202egnp.exe\u2066\x07{n}"
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def page() -> str:
    return fill_page(PAGE, {}, MAY)


# The file


def test_the_page_loads_nothing_else_and_asks_its_own_server_alone():
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', page())[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    script = rules.pop("script-src")
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", script)
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "connect-src": "'self'",
    }
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|<script src|<link (?!rel=\"icon\" href=\"data:,\")", page())


def test_pages_that_ask_nothing_may_not():
    assert "connect-src" not in fill_page(PAGE, {})


def test_texts_become_text_alone():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", page())
    assert not re.findall(r"<[^>]+ (on\w+|style)=", page())


def test_data_is_inert():
    filled = fill_page(PAGE, {"title": HOSTILE}, MAY)
    assert filled.count("<img") == 0
    assert filled.count("</script>") == page().count("</script>") == 2


def test_every_text_has_its_chinese():
    before, _, rest = page().partition("const ZH = {")
    table, _, after = rest.partition("\n};")
    chinese = dict(re.findall(r'"([^"\n]+)": "([^"\n]+)"', table))
    wanted = {*re.findall(r'data-t(?:-label|-placeholder)?="(.*?)"', before)}
    wanted |= {*re.findall(r'\bt\("(.*?)"', after)} | {*re.findall(r'"([A-Z{][^"]* [^"]*)"', after)}
    assert wanted <= chinese.keys()
    assert all(f'"{english}"' in before + after for english in chinese)
    for english, translated in chinese.items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", translated)), english


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def fake():
    fake = FakeServer(page)
    yield fake
    fake.close()


@pytest.fixture
def tab(browser, fake):
    """The page, open and connected to the fake server."""
    return connected(browser, fake)


def connected(browser, fake, **size):
    tab = browser.open(fake.address, **size)
    tab.until("models.length")
    return tab


def send(tab, text: str) -> None:
    """Type a question, press Enter and wait for the end of its answers."""
    tab.write("#question", text)
    tab.press("Enter", 13, "\r")
    tab.until("steps.length && !isBusy()")


def shown(tab, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")


def offer(tab, value) -> str:
    """Paste functions; returns what the page says of them."""
    tab.write("#tools", value if isinstance(value, str) else json.dumps(value))
    return shown(tab, "#tools-state")[0]


@needs_browser
def test_an_answer_is_streamed_with_reasoning_figures_and_settings(tab, fake):
    fake.answer = lambda _: words("let me see", "reasoning_content") + words("你好！")
    tab.write("#system", "be brief")
    tab.write("#temperature", "0.5")
    tab.write("#seed", "7")
    send(tab, "hi")
    assert fake.requests == [
        {
            "model": TUNED,
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "max_tokens": 1024,
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert shown(tab, ".asked") == ["hi"]
    assert shown(tab, ".answer .text") == ["你好！"]
    assert tab.run("document.querySelector('.answer details pre').textContent") == "let me see"
    assert re.fullmatch(r"prompt 1,234 · 13 tokens · \d\.\d s · [\d.]+ tokens/s", shown(tab, ".facts")[0])
    assert tab.run("$('question').value") == ""
    send(tab, "and?")
    assert [message["content"] for message in fake.requests[1]["messages"][1:]] == ["hi", "你好！", "and?"]
    assert fake.requests[1]["messages"][2]["reasoning_content"] == "let me see"


@needs_browser
def test_text_is_there_while_it_is_written_and_stop_cancels(tab, fake):
    def endless(_):
        yield from words("begun")
        while True:
            yield {"content": "."}

    fake.answer = endless
    tab.write("#question", "go on")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelector('.answer .text')?.textContent.startsWith('begun.')")
    assert shown(tab, "#send") == ["Stop"]
    tab.click("#send")
    tab.until("!isBusy()")
    assert fake.left.wait(10)
    assert shown(tab, ".facts strong") == ["stopped"]
    fake.answer = lambda _: words("done")
    tab.click("#retry")
    tab.until("!isBusy()")
    assert shown(tab, ".answer .text") == ["done"]
    assert fake.requests[1] == fake.requests[0]


@needs_browser
def test_both_models_answer_at_once_and_the_tuned_one_goes_on(tab, fake):
    together = threading.Barrier(2)

    def answer(request):
        together.wait(10)
        return words(f"{request['model']} to {request['messages'][-1]['content']}")

    fake.answer = answer
    assert not tab.run("$('beside-row').hidden")
    tab.click("#beside")
    send(tab, "one")
    assert {request["model"] for request in fake.requests} == {TUNED, BASE}
    assert shown(tab, ".answer .text") == [f"{TUNED} to one", f"{BASE} to one"]
    assert shown(tab, ".answer .tag") == ["tuned", "base"]
    assert "goes on with the tuned model's answer" in shown(tab, "#beside-note")[0]
    send(tab, "two")
    for request in fake.requests[2:]:
        assert [message["content"] for message in request["messages"]] == ["one", f"{TUNED} to one", "two"]
    left, right = tab.run("[...document.querySelectorAll('.answer')].slice(-2).map((node) => node.offsetTop)")
    assert left == right
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    above, below = tab.run("[...document.querySelectorAll('.answer')].slice(-2).map((node) => node.offsetTop)")
    assert above < below
    assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@needs_browser
def test_results_need_not_wait_for_the_base_and_stop_ends_all(tab, fake):
    def slow():
        while True:
            time.sleep(0.01)
            yield {"content": "."}

    fake.answer = lambda request: slow() if request["model"] == BASE else call(0, "f", "{}")
    tab.click("#beside")
    tab.write("#question", "hi")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelector('.send-results')")
    tab.write(".call textarea", "1")
    tab.press("Enter", 13, "\r")
    tab.until("steps.length === 2 && !lead(last()).running")
    assert [request["model"] for request in fake.requests].count(BASE) == 2
    assert tab.run("allAnswers().map((answer) => answer.running)") == [False, True, False, True]
    tab.click("#send")
    tab.until("!isBusy()")
    assert shown(tab, ".facts strong") == ["stopped", "stopped"]


@needs_browser
def test_one_model_alone_has_no_switch(browser, fake):
    fake.models = [TUNED]
    tab = connected(browser, fake)
    assert tab.run("$('beside-row').hidden")
    send(tab, "hi")
    assert shown(tab, ".answer .tag") == []


@needs_browser
def test_calls_get_results_over_two_rounds_and_the_row_is_what_training_takes(tab, fake):
    rounds = [
        call(0, "weather", '{"city": "北京", "n": 1.0}') + call(1, "weather", "{}"),
        call(0, "time", '{"zone": 8}'),
        words("sunny"),
    ]
    fake.answer = lambda _: rounds[len(fake.requests) - 1]
    tools = [WEATHER, {"name": "time"}]
    offer(tab, tools)
    send(tab, "北京?")
    assert fake.requests[0]["tools"] == [{"type": "function", "function": tool} for tool in tools]
    assert fake.requests[0]["tool_choice"] == "auto"
    assert shown(tab, ".call h3 code") == ["weather", "weather"]
    assert shown(tab, ".call tr") == ["city\t\n北京", "n\t\n1.0"]
    tab.write("#question", "too early")
    assert tab.run("$('send').disabled")
    assert shown(tab, "#hint") == ["Write the results of the calls first."]
    tab.click(".send-results")  # one is missing: that field gets the focus
    tab.call("Input.insertText", text='{"sky": "晴"}')
    tab.press("Enter", 13, "\r")
    tab.call("Input.insertText", text="24")
    tab.press("Enter", 13, "\r")
    tab.until("steps.length === 2 && !isBusy()")
    _, asked, *results = fake.requests[1]["messages"]
    assert [part["function"] for part in asked["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "北京", "n": 1.0}'},
        {"name": "weather", "arguments": "{}"},
    ]
    assert results == [
        {"role": "tool", "tool_call_id": "call-0", "content": '{"sky": "晴"}'},
        {"role": "tool", "tool_call_id": "call-1", "content": "24"},
    ]
    tab.write(".call textarea", "noon")
    tab.click(".send-results")
    tab.until("steps.length === 3 && !isBusy()")
    assert shown(tab, ".answer .text")[-1] == "sunny"
    assert tab.run("$('question').value") == "too early"
    tab.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
    tab.click("#download")
    line = tab.run("saved.text()")
    assert line.count("\n") == 1
    conversation = parse_row(json.loads(line))
    said = [turn.name or turn.content for turn in conversation.turns]
    assert said == ["北京?", "weather", "weather", "time", "sunny"]
    assert [turn.observation for turn in conversation.turns[1:4]] == ['{"sky": "晴"}', "24", "noon"]
    assert conversation.tools == tools


@needs_browser
def test_broken_arguments_are_shown_and_not_sent_back(tab, fake):
    fake.answer = lambda _: call(0, "weather", '{"city": "Bei')
    send(tab, "hi")
    assert shown(tab, ".call .fault") == ["These arguments are not a JSON object."]
    assert shown(tab, ".call pre") == ['{"city": "Bei']
    assert shown(tab, ".send-results") == []
    assert shown(tab, "#hint") == ["Retry the last answer, or edit the question."]
    tab.click("#edit")
    assert tab.run("$('question').value") == "hi"
    assert tab.run("steps.length") == 0


@needs_browser
def test_hostile_texts_run_nothing(browser, fake):
    fake.models = [HOSTILE, f"{HOSTILE}2"]
    fake.answer = lambda _: (
        words(HOSTILE, "reasoning_content") + words(HOSTILE) + call(0, HOSTILE, json.dumps({HOSTILE: HOSTILE}))
    )
    tab = connected(browser, fake)
    tab.run("document.addEventListener('securitypolicyviolation', () => { window.broken = 2; })")
    offer(tab, [{"name": HOSTILE, "description": HOSTILE}])
    tab.click("#beside")
    send(tab, HOSTILE)
    tab.write(".call textarea", HOSTILE)
    tab.click(".send-results")
    tab.until("steps.length === 2 && !isBusy()")
    tab.click("#language")
    assert tab.run("window.broken") is None
    assert tab.run("document.querySelectorAll('img, a, script:not(#data)').length") == 1
    assert tab.run("document.querySelector('.answer .text').textContent") == HOSTILE
    assert tab.run("document.querySelector('.call th').textContent") == HOSTILE
    assert tab.run("getComputedStyle(document.querySelector('.answer .text')).unicodeBidi") == "plaintext"


@needs_browser
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((400, {}, '{"error": {"message": "messages[0] is odd"}}'), "messages[0] is odd"),
        ((404, {}, '{"error": {"message": "no such model"}}'), "no such model"),
        ((429, {"Retry-After": "3"}, '{"error": {"message": "busy"}}'), "busy · Try again in 3 s."),
        ((500, {}, "<h1>oops</h1>"), "The server answered with status 500."),
        (iter([{"content": "a"}, {"error": {"message": "memory is full"}}]), "memory is full"),
        (iter([{"content": "a"}]), "The connection was lost before the answer ended."),
        (iter(["{"]), "The server's answer cannot be read."),
    ],
    ids=["400", "404", "429", "500", "event", "lost", "broken"],
)
def test_an_error_is_told_in_its_place_and_the_question_stays(tab, fake, answer, told):
    fake.answer = lambda _: answer
    send(tab, "hi")
    assert shown(tab, ".answer .fault")[0].split("\n")[0] == told
    assert shown(tab, ".asked") == ["hi"]
    fake.answer = lambda _: words("now")
    tab.click(".answer .fault button")
    tab.until("!isBusy()")
    assert shown(tab, ".answer .text") == ["now"]


@needs_browser
def test_a_server_that_is_gone_is_told_and_nothing_is_lost(browser, fake):
    tab = connected(browser, fake)
    fake.close()
    send(tab, "hi")
    assert "The server cannot be reached." in shown(tab, ".answer .fault")[0]
    tab.click("#edit")
    assert tab.run("$('question').value") == "hi"


@needs_browser
def test_the_key_is_asked_for_until_it_is_right(browser, fake):
    fake.key = "sesame"
    tab = browser.open(fake.address)
    tab.until("gate")
    assert shown(tab, "#gate-text") == ["The server asks for its key."]
    assert TUNED not in tab.run("document.documentElement.outerHTML + document.title")
    assert tab.run("[$('beside-row').hidden, $('send').disabled, $('log').textContent]") == [True, True, ""]
    assert tab.run("$('key').type") == "password"
    tab.write("#key", "wrong")
    tab.press("Enter", 13, "\r")
    tab.until("$('gate-text').textContent.includes('not accept')")
    tab.write("#key", "sesame")
    tab.press("Enter", 13, "\r")
    tab.until("models.length && $('gate').hidden")
    send(tab, "hi")
    assert shown(tab, ".answer .text") == ["hello"]
    fake.key = "changed"
    send(tab, "again")
    assert shown(tab, "#gate-text") == ["The server does not accept this key."]
    assert tab.run("[localStorage.length, document.cookie, sessionStorage.getItem('key')]") == [0, "", "sesame"]


@needs_browser
def test_functions_are_read_in_every_shape_and_their_faults_are_placed(tab, fake):
    wrapped = {"type": "function", "function": WEATHER}
    row = {"tools": [WEATHER, {"name": "time"}], "conversations": []}
    assert shown(tab, "#tools-state") == ["No functions are offered."]
    for value in (WEATHER, [WEATHER], wrapped, [wrapped], {"messages": [], "tools": json.dumps([WEATHER])}):
        assert offer(tab, value) == "1 function is offered: weather"
        assert tab.run("offered.tools") == [wrapped]
    assert offer(tab, row | {"name": "a row"}) == "2 functions are offered: weather, time"
    assert shown(tab, "#choice option") == ["it decides", "never", "always", "always weather", "always time"]
    for text, fault in {
        '[{"name": "a"},\n {name: 1}]': "not valid JSON at line 2, column 3: name: 1}]",
        '[{"name": "a"}': "not valid JSON at line 1, column 15: the text ends too early",
        '[{"name": "a"}, 5]': "[1] is not a function's description",
        '{"tools": [{"nam": "a"}]}': "tools[0] has no name",
        '[{"name": "a"}, {"name": "a"}]': "[1]: there are two functions named a",
        '[{"name": "a", "parameters": []}]': "[0].parameters is not a JSON Schema of an object",
        '{"conversations": []}': "JSON has no functions in tools",
        "[" * 5000: "not valid JSON at line 1, column 5001: the text ends too early",
        "[" * 5000 + "]" * 5000: "nested more than 100 levels deep",
        "[" * 101 + "]" * 101: "nested more than 100 levels deep",
        "[" * 100 + "]" * 100: "[0] is not a function's description",
        '{"a": [1, {}, [], -2.5e3, "\\u4e2d", {"b": null} ] } x': "not valid JSON at line 1, column 53: x",
        '{"a": [1, ]}': "not valid JSON at line 1, column 11: ]}",
        '{"a": 1,}': "not valid JSON at line 1, column 9: }",
    }.items():
        offer(tab, WEATHER)
        assert offer(tab, text) == fault
        assert tab.run("offered.tools") is None
    tab.write("#question", "hi")
    tab.press("Enter", 13, "\r")
    assert (fake.requests, tab.run("document.activeElement.id")) == ([], "tools")
    offer(tab, row)
    tab.run("$('choice').value = '= time'")
    send(tab, "hi")
    assert fake.requests[0]["tool_choice"] == {"type": "function", "function": {"name": "time"}}


@needs_browser
def test_whatever_goes_wrong_in_reading_functions_is_a_fault_of_the_field(tab):
    offer(tab, WEATHER)
    tab.run("readTools = () => { throw new RangeError('odd'); }")
    assert offer(tab, "[]") == "cannot be read: odd"
    assert tab.run("offered.tools") is None


@needs_browser
def test_an_answer_has_at_most_as_many_tokens_as_the_field_says(browser, fake):
    fake.room = 1000
    tab = connected(browser, fake)
    assert tab.run("$('max_tokens').value") == "500"  # a part of what the model has room for
    send(tab, "hi")
    tab.write("#max_tokens", "")
    tab.press("Backspace", 8)
    send(tab, "hi")
    tab.run("connect()")
    send(tab, "hi")
    assert [request.get("max_tokens") for request in fake.requests] == [500, None, None]


@needs_browser
def test_a_conversation_that_was_not_downloaded_is_not_left_without_a_word(tab):
    leaves = "dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert tab.run(leaves)
    send(tab, "hi")
    assert not tab.run(leaves)
    tab.run("URL.createObjectURL = () => '#'")
    tab.click("#download")
    assert tab.run(leaves)
    send(tab, "again")
    assert not tab.run(leaves)
    tab.click("#clear")
    assert tab.run(leaves)


@needs_browser
def test_an_answer_is_copied(tab):
    tab.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    send(tab, "hi")
    tab.click(".copy")
    tab.until("document.querySelector('.copy').textContent === 'Copied'")
    assert tab.run("copied") == "hello"


@needs_browser
def test_the_field_stays_in_its_place_when_models_are_compared(browser, fake):
    tab = connected(browser, fake, width=1440)
    places = "['question', 'send', 'retry'].map((id) => [$(id).getBoundingClientRect().left, $(id).offsetWidth])"
    send(tab, "hi")
    before = tab.run(places)
    assert before[0][1] == 820
    tab.click("#beside")
    send(tab, "hi")
    assert tab.run(places) == before
    single, pair = tab.run("[...document.querySelectorAll('.lanes')].map((node) => node.offsetWidth)")
    assert single == 820 < pair


@needs_browser
def test_a_narrow_page_is_compact(browser, fake):
    fake.models = ["chatglm3-6b-weather", "chatglm3-6b-with-a-name-base"]
    tab = connected(browser, fake, width=345, height=740)  # of 360, as a bar for scrolling may take the rest
    tab.click("#beside")
    for button in ("language", "theme", "language", "theme"):
        tab.click(f"#{button}")
        places = tab.run(
            "[...document.querySelectorAll('h1, header button')].map((node) => node.getBoundingClientRect().bottom)"
        )
        assert max(places) - min(places) < 8  # one row
        heights = tab.run("[...document.querySelectorAll('#models bdi')].map((node) => node.offsetHeight)")
        assert max(heights) < 24  # one line each
        assert tab.run("$('composer').offsetHeight") < 0.2 * 740
        assert tab.run("document.documentElement.scrollWidth") == 345


@needs_browser
def test_the_language_changes_and_nothing_else(tab, fake):
    fake.answer = lambda _: call(0, "weather", "{}")
    send(tab, "hi")
    tab.write(".call textarea", "half a res")
    tab.click("#language")
    assert shown(tab, "#send") == ["发送"]
    assert shown(tab, ".call label") == ["weather 的结果"]
    assert tab.run("document.documentElement.lang") == "zh-CN"
    assert tab.run("$('question').placeholder") == "输入消息"
    assert tab.run("document.querySelector('.call textarea').value") == "half a res"


@needs_browser
def test_the_enter_that_ends_a_composition_does_not_send(tab, fake):
    tab.run("$('question').focus()")
    tab.call("Input.imeSetComposition", text="ni'hao", selectionStart=6, selectionEnd=6)
    tab.press("Enter", 229)
    tab.press("Enter", 13)
    tab.call("Input.insertText", text="你好")
    tab.press("Enter", 229)  # Safari: after the composition has ended
    tab.press("Enter", 13, "\r", modifiers=8)  # Shift
    assert fake.requests == []
    assert tab.run("$('question').value") == "你好\n"
    send(tab, "你好")
    assert len(fake.requests) == 1


@needs_browser
def test_what_is_cleared_can_be_brought_back(tab, fake):
    send(tab, "hi")
    tab.click("#clear")
    assert shown(tab, ".answer") == []
    assert shown(tab, "#clear") == ["Bring back"]
    tab.click("#clear")
    assert shown(tab, ".answer .text") == ["hello"]


@needs_browser
def test_the_page_follows_an_answer_only_from_its_bottom(tab, fake):
    scrolled = threading.Event()

    def answer(_):
        yield from words("line\n" * 100)
        scrolled.wait(10)
        yield from words("more\n" * 100)

    fake.answer = answer
    tab.write("#question", "hi")
    tab.press("Enter", 13, "\r")
    tab.until("scrollY > 1500 && document.body.scrollHeight - scrollY - innerHeight < 2")
    tab.run("scrollTo(0, 5)")
    scrolled.set()
    tab.until("!isBusy()")
    assert tab.run("[scrollY, document.body.scrollHeight > 5000]") == [5, True]


@needs_browser
def test_the_page_talks_to_the_server_itself(browser, server, write):
    called = "weather\n ```python\ntool_call(city='北京')\n```"
    server.engine.answers = [write(called), write("\n 晴"), write("\n 好")]
    tab = browser.open(f"{server.url}/")
    tab.until("models.length")
    offer(tab, WEATHER)
    send(tab, "北京?")
    assert shown(tab, ".call tr") == ["city\t\n北京"]
    tab.write(".call textarea", "24")
    tab.press("Enter", 13, "\r")
    tab.until("steps.length === 2 && !isBusy()")
    assert shown(tab, ".answer .text")[-1] == "晴"
    tab.run("document.querySelector('#beside').click()")
    send(tab, "谢谢")
    assert shown(tab, ".answer .text")[-2:] == ["好", "好"]
    assert [generation.adapted for generation in server.engine.asked] == [True, True, True, False]
    assert shown(tab, ".fault") == []


@needs_browser
def test_stop_ends_the_servers_work(browser, server, write):
    server.engine.answers, server.engine.pause = [write("\n" + " go on" * 3000)], 0.01
    tab = browser.open(f"{server.url}/")
    tab.until("models.length")
    tab.write("#question", "go")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelector('.answer .text')?.textContent.length > 10")
    tab.press("Escape", 27)
    tab.until("!isBusy()")
    wait_until(lambda: server.engine.cancelled)
