"""A server of ours under test: started from any checkout, with what the system says of its processes.

For Linux: processes are found and read through /proc.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench.lib.processes import children, descriptors, resident, threads

START_SECONDS = 300.0
RESTART_LIMIT = 120.0


class Served:
    """`engine serve` of the checkout `root`, by its own interpreter; `with` it: it ends with the block."""

    def __init__(self, *flags: str, root: Path | None = None) -> None:
        python = sys.executable if root is None else str(root / ".venv/bin/python")
        command = [python, "-m", "engine.cli", "serve", "--port", "0", "--log-level", "debug", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=root
        )
        self.url = ""
        self.log: list[str] = []
        self.workers: list[int] = []  # each that was the worker, in order
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line)
            if found := re.search(r"device workers are processes (\d+)", line):
                self.workers.append(int(found[1]))
            if found := re.search(r"ready after .* on (http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def __enter__(self) -> "Served":
        self._ready.wait(START_SECONDS)
        if not self.url:
            self.__exit__()
            raise SystemExit("the server does not start:\n" + "".join(self.log[-20:]))
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """GET `path`, or POST a JSON body: the status, and the JSON that came."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ready(self) -> bool:
        return self.ask("/health")[0] == 200

    def kill_worker(self) -> float:
        """SIGKILL the worker; seconds until the server is ready again."""
        known, began = len(self.workers), time.monotonic()
        os.kill(self.workers[-1], signal.SIGKILL)
        while len(self.workers) == known or not self.ready():
            if time.monotonic() - began > RESTART_LIMIT:
                raise SystemExit(f"not ready {RESTART_LIMIT:.0f} s after a kill:\n" + "".join(self.log[-20:]))
            time.sleep(0.01)
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        return self._process.pid

    def processes(self) -> dict[int, str]:
        """Process id to its role: front, or the module that it runs (`engine.worker`)."""
        return {self._process.pid: "front", **children(self._process.pid)}

    def spares(self) -> list[int]:
        """Workers that wait for the one that runs to die."""
        return [pid for pid, role in self.processes().items() if role == "engine.worker" and pid != self.workers[-1]]

    def figures(self) -> dict[str, int]:
        """Descriptors and threads of the front, MiB resident of each role, and pages of the cache."""
        front = self._process.pid
        found = {"descriptors": descriptors(front), "threads": threads(front)}
        for pid, role in self.processes().items():
            key = f"{role.removeprefix('engine.')} MiB"
            if role != "engine.worker" or pid == self.workers[-1]:
                found[key] = found.get(key, 0) + resident(pid)
        return found | self.held()

    def held(self) -> dict[str, int]:
        """Pages of the cache that requests hold, and requests that run or wait."""
        self.ask("/flush_cache", {})
        (state,) = self.ask("/server_info")[1]["internal_states"]
        return {
            "pages held": state["pages"] - state["pages_free"],
            "running": state["running"] + state["waiting"],
        }
