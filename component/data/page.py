"""Pages that load nothing else: a template with our style and helpers (page.css, page.js), and its data as text."""

import base64
import hashlib
import json
import re
from pathlib import Path

SHARED = {"__STYLE__": "page.css", "__HELPERS__": "page.js"}
# Nothing is loaded, and of scripts the page's own runs alone, whatever a text of the data holds.
POLICY = "default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
POLICY += "form-action 'none'"


def fill_page(template: Path, data: dict, allowed: str = "") -> str:
    """Fill a template that has __STYLE__, __HELPERS__, __POLICY__ and __DATA__ in their places.

    `allowed`: what the policy allows beside its own, such as `; connect-src 'self'` for a page that asks its server.
    The data stands in the page as JSON without `<`, so that no text of it can end the element that holds it. The page's
    script shows texts as text.
    """
    html = template.read_text(encoding="utf-8")
    for place, file in SHARED.items():
        html = html.replace(place, Path(__file__).with_name(file).read_text(encoding="utf-8").strip())
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return html.replace("__POLICY__", POLICY.format(digest=digest) + allowed).replace("__DATA__", text)
