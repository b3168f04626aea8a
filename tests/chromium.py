"""Drive headless Chromium from a test: WebDriver is JSON over HTTP, so chromedriver and httpx are all it takes."""

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key by which WebDriver's JSON names an element
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")


def missing() -> str | None:
    """Return why there is no browser here, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: apt-get install chromium chromium-driver)" if absent else None


class Browser:
    """A session. Elements are found by CSS selectors, anew for every call."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._path = client, f"/session/{session}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the value of one WebDriver command."""
        answer = self._client.request(method, self._path + path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.is_success, f"{method} {path}: {value['error']}: {value['message']}"
        return value

    def go(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Return the text of the first match as it is shown."""
        return self.call("GET", f"/element/{self._find(selector)}/text")

    def click(self, selector: str) -> None:
        """Click on the first match."""
        self.call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into the first match."""
        self.call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def resize(self, width: int, height: int) -> None:
        """Give the page itself this size, as a phone's would have."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.call("POST", "/goog/cdp/execute", command)

    def shot(self) -> bytes:
        """Return a PNG of what is visible."""
        return base64.b64decode(self.call("GET", "/screenshot"))

    def wait(self, script: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """Return what a script returns once that counts as true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"still false after {seconds} s: {script}"
            time.sleep(0.02)
        return value

    def _find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]


@contextmanager
def browser(folder: Path, *, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """Run chromedriver on a free port and open a session; its home and profile lie in `folder`."""
    environment = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    command = ["chromedriver", "--port=0"]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    try:
        assert driver.stdout is not None
        started = next(line for line in driver.stdout if "started successfully on port" in line)
        port = started.rstrip(".\n").rsplit(" ", 1)[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            options = {"args": [*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            value = client.post("/session", json=wanted).json()["value"]
            assert "sessionId" in value, value
            try:
                yield Browser(client, value["sessionId"])
            finally:
                client.delete(f"/session/{value['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=20)
