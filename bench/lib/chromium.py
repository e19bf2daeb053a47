"""A headless Chromium with one tab, driven over its DevTools protocol."""

import os
import shutil
import signal
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-port=0",
)


def installed() -> str | None:
    """The path of a Chromium, if this machine has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """What the browser's one tab shows."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.asked: list[str] = []  # every URL that it has asked for
        self.errors: list[str] = []  # what its console shows as an error
        self._socket = socket
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._loaded = False
        self._news = anyio.Event()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = await self._send(method, params)
        await self._until(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    async def open(self, url: str) -> None:
        """Go to `url`, as someone who types it does, and wait for the page's load event."""
        self._loaded = False
        await self.call("Page.navigate", url=url)
        await self._until(lambda: self._loaded)

    async def follow(self, url: str) -> None:
        """Go to `url` by a link in the page that is open."""
        self._loaded = False
        link = "Object.assign(document.createElement('a'), {href: URL}).click()".replace("URL", f"'{url}'")
        await self.call("Runtime.evaluate", expression=link)
        await self._until(lambda: self._loaded)

    async def run(self, script: str) -> Any:
        """What the body of an asynchronous function returns in the page."""
        body = f"(async () => {{ {script} }})()"
        found = await self.call("Runtime.evaluate", expression=body, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def resize(self, width: int, height: int) -> None:
        """Show the page in a window of that size."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def shot(self) -> bytes:
        """A PNG of what the window shows."""
        taken = await self.call("Page.captureScreenshot", format="png")
        return b64decode(taken["data"])

    async def picture(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Write a PNG of the page in a window of that size."""
        await self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.run("await new Promise(done => setTimeout(done, 700));")
        path.write_bytes(await self.shot())  # noqa: ASYNC240

    async def _until(self, so: Any) -> None:
        while not so():
            await self._news.wait()

    async def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number = number = self._number + 1
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return number

    async def listen(self) -> None:
        async for message in self._socket:
            said = msgspec.json.decode(message.data)
            if "id" in said:
                self._answers[said["id"]] = said
            elif said["method"] == "Page.loadEventFired":
                self._loaded = True
            elif said["method"] == "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
            elif (error := console_error(said)) is not None:
                self.errors.append(error)
            self._news.set()  # all who wait look again
            self._news = anyio.Event()


def console_error(said: dict[str, Any]) -> str | None:
    """What an event of the browser shows as an error in the console, if it does."""
    params = said["params"]
    match said["method"]:
        case "Runtime.exceptionThrown":
            return str(params["exceptionDetails"])
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
            return str(params["args"])
        case "Log.entryAdded" if params["entry"]["level"] == "error":
            return f"{params['entry']['text']} {params['entry'].get('url', '')}"
    return None


@asynccontextmanager
async def open_tab(path: str, *flags: str) -> AsyncIterator[Tab]:
    """A tab of a browser with a new profile, which ends with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *FLAGS, f"--user-data-dir={profile}", *flags, "about:blank"]
        # In a session of its own, so that all of its processes can be ended.
        process = subprocess.Popen(  # noqa: ASYNC220
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async with aiohttp.ClientSession() as session:
                socket_url = await _first_tab(session, Path(profile) / "DevToolsActivePort", process)
                async with (
                    session.ws_connect(socket_url, max_msg_size=0) as socket,
                    anyio.create_task_group() as group,
                ):
                    tab = Tab(socket)
                    group.start_soon(tab.listen)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await tab.call(f"{domain}.enable")
                    yield tab
                    group.cancel_scope.cancel()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _first_tab(session: aiohttp.ClientSession, file: Path, process: "subprocess.Popen[bytes]") -> str:
    """Where the tab is spoken to, once it is there."""
    while True:
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        lines = file.read_text().splitlines() if file.exists() else []  # noqa: ASYNC240
        if len(lines) == 2:
            async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as response:
                for target in await response.json():
                    if target["type"] == "page":
                        return str(target["webSocketDebuggerUrl"])
        await anyio.sleep(0.05)
