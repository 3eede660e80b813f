"""Chromium without a window, driven through its DevTools protocol: pages, keys, files that are dropped, pictures."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"),
)
"""Nothing but this machine is found. Without a sandbox, since root has none: what is opened is ours."""
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    " ": ("Space", 32, " "),
}
"""Key → its code, its number, and the text that it types."""
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}


def installed() -> str | None:
    """Return the browser's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started() -> Iterator[Browser]:
    """Start a browser with a profile of its own; it ends with the block."""
    program = installed()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="tandem-browser-", ignore_cleanup_errors=True) as profile:
        command = [program, *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                with connect(_address(process), max_size=None) as socket:
                    browser = Browser(socket)
                    yield browser
                    browser.send("Browser.close")
                    process.wait(10)
            finally:
                process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("DevTools listening on "):
            return line.split()[-1]
    raise AssertionError("the browser ended before it listened")


class Browser:
    """The connection to a browser. Events are kept by session until they are asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, count(1)
        self.events: dict[str, list[dict[str, Any]]] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return a command's result. Raises AssertionError where the browser refuses it."""
        number = next(self._ids)
        about = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(about | ({"sessionId": session} if session else {})))
        while True:
            told = json.loads(self._socket.recv(timeout=30))
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                result: dict[str, Any] = told["result"]
                return result
            if "method" in told:
                self.events.setdefault(told.get("sessionId", ""), []).append(told)

    @contextmanager
    def page(self, url: str) -> Iterator[Page]:
        """Open a page as someone who was never there: nothing is stored yet."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.size(1280, 800)
        page.open(url)
        try:
            yield page
        finally:
            self.send("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def open(self, url: str) -> None:
        """Load a URL and wait until its scripts have run."""
        self.send("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def reload(self) -> None:
        self.run("window.before = true")
        self.send("Page.reload")
        self.wait("!window.before && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page. Raises AssertionError where it throws."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, f"{script}: {told['exceptionDetails']}"
        return told["result"].get("value")

    def wait(self, script: str, within_s: float = 15.0) -> Any:
        """Return an expression's value as soon as it is true. Raises AssertionError with the page's text."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            told = self.send("Runtime.evaluate", expression=script, returnByValue=True)  # may throw while it loads
            value = told["result"].get("value")
            if "exceptionDetails" not in told and (value or value == {}):  # an element has no value, and comes as {}
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}; the page: {self.run('document.body.innerText')}")

    def click(self, selector: str) -> None:
        """Click with the mouse, in the middle of an element that is in sight."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Put a text where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *modifiers: str) -> None:
        """Press a key: one of KEYS, or a letter."""
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key.upper()[0]), key))
        held = sum(MODIFIERS[name] for name in modifiers)
        about = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": held}
        typed = {"text": text} if text and not held & ~MODIFIERS["Shift"] else {}
        self.send("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **about, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def drop(self, selector: str, file: Path) -> None:
        """Drag a file over an element and drop it there."""
        x, y = self._middle(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('input', {bubbles: true}));"
            " e.dispatchEvent(new Event('change', {bubbles: true})) })()"
        )

    def size(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, **features: str) -> None:
        """Set media features, `prefers_color_scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def picture(self, path: Path) -> None:
        """Write what is seen to a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def requested(self) -> list[str]:
        """Return the URLs of all requests so far."""
        self.run("0")  # so that what has happened is here
        return [each["params"]["request"]["url"] for each in self._told("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Return what the browser complained of: errors that were thrown, and breaches of the content policy."""
        self.run("0")
        thrown = [str(each["params"]["exceptionDetails"]) for each in self._told("Runtime.exceptionThrown")]
        logged = [each["params"]["entry"] for each in self._told("Log.entryAdded")]
        return thrown + [entry["text"] for entry in logged if entry["source"] != "network"]

    def _told(self, method: str) -> list[dict[str, Any]]:
        return [each for each in self._browser.events.get(self._session, ()) if each["method"] == method]

    def _middle(self, selector: str) -> tuple[float, float]:
        found = self.wait(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            " return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null })()"
        )
        return found[0], found[1]
