"""A headless Chromium over its debugging pipe: open a page at a width, in light or dark, and look.

As a script it takes pictures: python tests/browser.py report.html FOLDER
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)


def find_browser() -> str | None:
    """The browser in $CHROME or on the path."""
    wanted = os.environ.get("CHROME")
    return wanted or next(filter(None, map(shutil.which, NAMES)), None)


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at a page shows."""

    complaints: list[str]
    """Console messages of level warning and error, exceptions, and requests that went out or failed."""
    screen: bytes
    """The whole page as PNG."""
    answers: dict[str, Any]
    """The values of the scripts that were asked."""


class Browser:
    """A running browser; commands of the DevTools protocol, one JSON object per zero byte."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
        ]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--hide-scrollbars"]

        def take_pipes() -> None:  # the protocol's are 3 (in) and 4 (out)
            ends = os.dup(to_read), os.dup(from_write)
            spare = [os.dup(end) for end in ends]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self._process = subprocess.Popen(
            [program, *flags, "about:blank"],
            preexec_fn=take_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("LOUD") else subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **settings: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._call(method, session=self._session, **settings)

    def _call(self, method: str, session: str | None = None, **settings: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": settings}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def wait_for(self, event: str) -> None:
        """Until the page has said so."""
        while not any(each.get("method") == event for each in self.events):
            self.events.append(self._read())


@contextlib.contextmanager
def browsing(program: str) -> Iterator[Browser]:
    browser = Browser(program)
    try:
        yield browser
    finally:
        browser.close()


def look(
    browser: Browser, page: Path, *, width: int, dark: bool = False, ask: dict[str, str] | None = None
) -> Look:
    """Open `page` in a window of that width; `ask`: scripts by name."""
    browser.events.clear()
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.call("Emulation.setEmulatedMedia", features=scheme)
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.call("Emulation.setDeviceMetricsOverride", **metrics)
    browser.call("Page.navigate", url=page.absolute().as_uri())
    browser.wait_for("Page.loadEventFired")
    answers = {}
    for name, script in (ask or {}).items():
        result = browser.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]
        answers[name] = result.get("value")
    shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
    return Look(_complaints(browser.events, page), base64.b64decode(shot["data"]), answers)


def _complaints(events: list[dict[str, Any]], page: Path) -> list[str]:
    found = []
    for event in events:
        what, about = event.get("method"), event.get("params", {})
        if what == "Runtime.exceptionThrown":
            found.append(str(about["exceptionDetails"]["text"]))
        elif what == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            found.append(str(about["args"]))
        elif what == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            found.append(about["entry"]["text"])
        elif what == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if url != page.absolute().as_uri() and not url.startswith(("data:", "about:")):
                found.append(f"asks for {url}")
    return found


def main() -> None:
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    program = find_browser()
    if program is None:
        raise SystemExit(f"no browser: set CHROME, or install one of {', '.join(NAMES)}")
    folder.mkdir(parents=True, exist_ok=True)
    with browsing(program) as browser:
        for width in (1280, 400):
            for dark in (False, True):
                seen = look(
                    browser,
                    page,
                    width=width,
                    dark=dark,
                    ask={"wide": "document.documentElement.scrollWidth"},
                )
                file = folder / f"{width}-{'dark' if dark else 'light'}.png"
                file.write_bytes(seen.screen)
                print(file, f"content {seen.answers['wide']} wide", seen.complaints or "no complaints")


if __name__ == "__main__":
    main()
