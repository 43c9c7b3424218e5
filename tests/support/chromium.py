"""A page as a browser shows it: Chromium without a window, spoken to through a pipe.

The DevTools protocol over file descriptors 3 and 4 needs no port and no package: each message is
JSON and ends in a NUL.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# What a page may not cause: messages of the console, errors, requests beyond the file itself.
HEARD = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@dataclass
class Tab:
    """One page that is open; `events` are all that the browser has told."""

    writes: int
    reads: Any
    session: str | None = None
    count: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.count:
                assert "error" not in told, told
                return told["result"]

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Shows a file in a window of this width."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        loader = self.ask("Page.navigate", url=page.resolve().as_uri())["loaderId"]
        # Of this very page: the one before it may still be telling that it has loaded.
        loaded = {"loaderId": loader, "name": "load"}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self._next()

    def value(self, expression: str) -> Any:
        """What JavaScript says of the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """What the page has written to the console, and errors."""
        return [event for event in self.events if event["method"] in HEARD]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.reads.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        told = json.loads(text)
        if "method" in told:
            self.events.append(told)
        return told


@contextmanager
def tab(directory: Path) -> Iterator[Tab]:
    """A browser of its own with one empty page; skips the test where there is none."""
    found = [path for path in map(shutil.which, NAMES) if path is not None]
    if not found:
        pytest.skip(f"needs a browser: one of {', '.join(NAMES)} (apt-get install chromium)")
    commands, answers = os.pipe(), os.pipe()
    # Inherited under these two numbers, whatever they are here.
    shell = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags += ["--disable-dev-shm-usage", f"--user-data-dir={directory / 'profile'}"]
    process = subprocess.Popen(
        ["bash", "-c", shell, "browser", found[0], *flags],
        pass_fds=(commands[0], answers[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    with os.fdopen(answers[0], "rb") as reads:
        browser = Tab(commands[1], reads)
        target = browser.ask("Target.createTarget", url="about:blank")
        attached = browser.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Tab(commands[1], reads, session=attached["sessionId"], count=browser.count)
        for domain in ("Page", "Runtime", "Log"):
            page.ask(f"{domain}.enable")
        page.ask("Page.setLifecycleEventsEnabled", enabled=True)
        page.events.clear()
        try:
            yield page
        finally:
            os.close(commands[1])  # it ends when nobody can speak to it
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
