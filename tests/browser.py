"""A headless Chromium for tests of pages, where one is installed (Debian's package chromium)."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 20  # seconds


class Browser:
    """Chromium, spoken to in its DevTools protocol through two pipes: JSON, each message ended by a zero byte."""

    def __init__(self, profile: Path):
        (child_reads, self.to_child), (self.from_child, child_writes) = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--lang=en", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"]
        # Chromium reads from descriptor 3 and writes to 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{child_reads} 4>&{child_writes}', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=(child_reads, child_writes), stderr=subprocess.DEVNULL)
        os.close(child_reads)
        os.close(child_writes)
        self.received = b""
        self.sent = 0

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """Call a method, wait for its result, and leave events unread."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.to_child, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self.read(deadline)
            if answer.get("id") == self.sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def read(self, deadline: float) -> dict:
        while b"\0" not in self.received:
            if not select.select([self.from_child], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("chromium does not answer")
            part = os.read(self.from_child, 1 << 20)
            if not part:
                raise ConnectionError("chromium has ended")
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, **size: Any) -> "Tab":
        return Tab(self, address, **size)

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        os.close(self.to_child)
        os.close(self.from_child)
        self.process.wait(PATIENCE)


class Tab:
    """A page in a window of its own, which shares nothing with others."""

    def __init__(self, browser: Browser, address: str, width: int = 1280, height: int = 900, dark: bool = False):
        self.browser = browser
        context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {condition}\n{self.run('document.body.innerText')}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def write(self, selector: str, text: str) -> None:
        """Put text into a field as typing does, in place of what is there."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", **more: Any) -> None:
        """Press and release a key; `code` is the keyCode that the page sees."""
        kind = "keyDown" if text else "rawKeyDown"
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type=kind, text=text, **keys, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys, **more)
