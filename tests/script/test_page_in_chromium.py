"""The inspector's page in a real browser, where one is installed (Debian's package chromium)."""

import html
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from component.data.dataset import ChatGLM3SFTDataset
from component.data.inspection import Inspection

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"


def dom(page: Path, fragment: str = "") -> str:
    """The page's elements after its program has run."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--lang=en"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def make_page(tmp_path, tiny_tokenizer):
    def make(rows: list[dict]) -> tuple[Path, Inspection]:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = ChatGLM3SFTDataset(data, tiny_tokenizer, 4000, on_bad_row="skip", max_bad_share=1.0)
        inspection = Inspection(dataset, tiny_tokenizer)
        page = tmp_path / "page.html"
        page.write_text(inspection.html(HOSTILE, "nano", "chatglm3", 5000), encoding="utf-8")
        return page, inspection

    return make


def test_rows_calls_and_faults_are_laid_out_and_data_stays_text(make_page):
    call = {"role": "tool", "name": "weather", "parameters": {"city": HOSTILE}, "observation": {"t": HOSTILE}}
    row = {"conversations": [{"role": "user", "content": HOSTILE}, call, {"role": "assistant", "content": "end"}]}
    faulty = [{"conversations": [{"role": role, "content": "x"}]} for role in (HOSTILE, "{toString}")]
    page, _ = make_page([row, *faulty, row])
    shown = dom(page, "#row=1")
    assert "<img" not in shown[shown.index("<body") : shown.index('id="data"')]
    assert "<img" not in shown[shown.index("</script>", shown.index('id="data"')) :].split("<script")[0]
    assert "<title>broken" not in shown
    text = html.unescape(re.sub(r"<[^>]+>", " ", shown.split('id="data"')[0]))
    assert "expected system, user, assistant, tool or observation" in text
    assert "role is '{toString}'" in text
    assert text.index("expected system, user") < text.index("2 of 2 rows")
    detail = shown[shown.index('id="detail"') :]
    assert "weather" in detail
    assert "city" in detail
    assert len(re.findall(r'data-row="\d"', shown)) == 2


def test_a_long_figure_stays_on_its_line(make_page):
    page, inspection = make_page([{"conversation": [{"human": "q", "assistant": "a"}]}])
    inspection.report.tokens = 1_728_148
    measure = "document.title = Math.max(...[...document.querySelectorAll('dd')].map((node) => node.offsetHeight))"
    text = inspection.html("rows", "nano", "chatglm3", 1)
    text = re.sub("<meta http-equiv.*?>", "", text)  # the policy, which forbids any script but the page's own
    page.write_text(text.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
    assert int(re.search("<title>(.*?)</title>", dom(page))[1]) < 40


def test_more_faults_than_the_page_holds_are_counted(make_page):
    page, _ = make_page([{"conversation": [{"human": "q", "assistant": "a"}]}, *[{"text": "x"}] * 1200])
    shown = dom(page)
    assert "Faults (1,200)" in shown
    assert "900 more are not shown" in shown


def test_five_thousand_rows_stay_few_elements(make_page):
    rows = [
        {"conversations": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "word " * 60}]}
        for i in range(5000)
    ]
    page, inspection = make_page(rows)
    assert sum(inspection.lengths) > 5000 * 100
    started = time.monotonic()
    shown = dom(page)
    assert time.monotonic() - started < 30
    assert "5000 of 5000 rows" in html.unescape(shown).replace(",", "")
    assert 5 < len(re.findall(r'data-row="\d+"', shown)) < 60
