"""A headless Chromium, driven by the DevTools protocol over a pipe, which needs no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """
    One page in a headless Chromium.

    Args:
        profile: An empty folder.

    Attributes:
        requested: The addresses that the page has asked for.
        problems: Uncaught errors of the page.
    """

    def __init__(self, profile: Path) -> None:
        assert EXECUTABLE is not None
        ours, theirs = os.pipe(), os.pipe()  # what it reads, and what it writes
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-extensions", "--disable-background-networking", "--hide-scrollbars", "--mute-audio"]
        command = [EXECUTABLE, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # Chromium takes the pipe at 3 and 4. The shell puts it there; `preexec_fn` is not safe with threads.
        script = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command],
            pass_fds=[ours[0], theirs[1]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb", buffering=0)
        self._number, self._rest, self._session = 0, b"", None
        self.requested: list[str] = []
        self.problems: list[str] = []
        # the page that it begins with: one in the background would not be painted
        while not (pages := [it for it in self.send("Target.getTargets")["targetInfos"] if it["type"] == "page"]):
            time.sleep(0.05)
        target = pages[0]["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write.close()  # it ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._read.close()

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps({"id": self._number, "method": method, "params": parameters, **session}).encode())
        self._write.write(b"\0")
        while True:
            while b"\0" not in self._rest:
                received = os.read(self._read.fileno(), 1 << 20)
                if not received:
                    raise RuntimeError("Chromium has ended.")
                self._rest += received
            text, self._rest = self._rest.split(b"\0", 1)
            message = json.loads(text)
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            elif message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def open(self, address: str, width: int, height: int = 900) -> None:
        """Open a page at this width."""
        self.resize(width, height)
        self.send("Page.navigate", url=address)

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the page in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def js(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:1000])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true.

        Raises:
            TimeoutError: It is still false; the message has the text of the page.
        """
        deadline = time.monotonic() + seconds
        while not self.js(f"!!({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}\n{self.js('document.body.innerText')}\n{self.problems}")
            time.sleep(0.05)

    def click(self, element: str) -> None:
        """Click on the element that a JavaScript expression returns, as a mouse does."""
        self.wait(element)
        self.js(f"({element}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.js(f"(r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **box, button="left", clickCount=1)

    def type(self, element: str, text: str) -> None:
        """Replace the text of a field."""
        self.wait(element)
        self.js(f"(({element}).focus(), ({element}).select())")
        self.send("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press the Enter key."""
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save a picture of the page, with what is below the window if `whole`."""
        content = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(content))
