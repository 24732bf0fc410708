# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's Chromium without a screen, asked through its DevTools pipe: how pages of ours are seen and measured.

Messages are JSON, each ended by a zero byte: commands go to descriptor 3 of the browser, answers and events come from
its descriptor 4 (``--remote-debugging-pipe``).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import selectors
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from types import TracebackType
from typing import Any, Self

ANSWERS_WITHIN = 120.0  # seconds, on a busy machine
_ABOVE = 10  # descriptors that are in nobody's way when two of them become 3 and 4
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root cannot have; the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)

Json = dict[str, Any]


class Chromium:
    """A browser with one page.

    :ivar requests: the addresses that the page has asked for since it was opened, itself included.
    :ivar complaints: what the browser's console said of the page.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._folder = TemporaryDirectory(prefix="kvmi-chromium-", ignore_cleanup_errors=True)
        self._log = (Path(self._folder.name) / "log").open("wb")
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, _ABOVE) for end in (commands, answers)]
        move = "exec 3<&{0} 4>&{1} {0}<&- {1}>&-; exec chromium ".format(*theirs)
        self._process = subprocess.Popen(
            ["bash", "-c", f'{move} "$@"', "bash", *_FLAGS, f"--user-data-dir={self._folder.name}/profile"],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        for end in (commands, answers, *theirs):
            os.close(end)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, **parameters: object) -> Json:
        """Carry out a command of the DevTools protocol, and return its result.

        :raise TimeoutError: the browser does not answer.
        :raise RuntimeError: it cannot do it, or has ended.
        """
        self._number += 1
        message: Json = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = monotonic() + ANSWERS_WITHIN
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"Chromium, {method}: {answer['error']['message']}")
                result: Json = answer["result"]
                return result

    def show(self, page: Path | str, width: int, *, dark: bool = False, scripts: bool = True) -> None:
        """Open a file, or an address, in a window of that many pixels, and wait until it is loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._loaded = False
        self.requests.clear()
        self.complaints.clear()
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        deadline = monotonic() + ANSWERS_WITHIN
        while not self._loaded:
            self._next(deadline, "loading")

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression comes to in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"JavaScript: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG image."""
        file.parent.mkdir(parents=True, exist_ok=True)
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def print(self, file: Path) -> None:
        """The page as a PDF file, as a printer would have it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        pdf = self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(pdf["data"]))

    def close(self) -> None:
        """End the browser, and take away what it has left."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for descriptor in (self._commands, self._answers):
            os.close(descriptor)
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, deadline: float, what: str) -> Json:
        """The next message; an event is taken note of."""
        while b"\0" not in self._unread:
            if not self._selector.select(max(0.0, deadline - monotonic())):
                raise TimeoutError(f"Chromium did not answer within {ANSWERS_WITHIN:g} s: {what}")
            if not (data := os.read(self._answers, 1 << 20)):
                log = Path(self._log.name).read_text(errors="replace")
                raise RuntimeError(f"Chromium has ended, at {what}; it said:\n{log[-2000:]}")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        message: Json = json.loads(text)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(parameters["exceptionDetails"]["text"])
        return message
