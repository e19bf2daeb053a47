"""The spare worker, as a real process: when there is one, who gets it, and what happens when it dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.actors import spare as spare_module
from engine.actors.executor import ExecutorActor
from engine.actors.spare import MOST_LOST, Spare
from engine.config import Config, resolve
from engine.messages import FromWorker
from engine.messages.control import Boot, Pong, Preload, Reset, WorkerLost, WorkerReady
from engine.runtime.channel import BlockingFrames, channel, open_channel
from engine.runtime.process import Process, spawn
from engine.worker.spare import OOM_SCORE, imported_since

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
CONFIG = resolve(
    {"model": "echo", "max_running": 4, "kv_tokens": 512, "threads": 1, "device": "cpu", "spare_worker": True}
)


def gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not true():
            await anyio.sleep(0.01)


class Starter:
    """Starts what it is told to, and keeps the processes in order."""

    def __init__(self, module: str = "engine.worker", script: str = "") -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self._module, self._script = module, script

    def __call__(self) -> tuple[socket.socket, Process]:
        if self._script:
            sock, theirs = socket.socketpair()
            command = [sys.executable, "-c", self._script, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
        else:
            sock, process = spawn(self._module)
        self.started.append(process)
        return sock, process


class House:
    """An executor with a spare, and what it tells the scheduler."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.start = Starter()
        self.to_executor, inbox = channel(4)
        outbox, self.heard = open_channel()
        self.executor = ExecutorActor(config, inbox, outbox, self.start, spare_seconds=0.0)
        self.spare = self.executor.spare

    async def next(self, kind: type[Any]) -> Any:
        with anyio.fail_after(60):
            message = await self.heard.receive()
        assert isinstance(message, kind), message
        return message

    async def kill(self, process: Process) -> WorkerLost:
        process.kill()
        lost: WorkerLost = await self.next(WorkerLost)
        await self.to_executor.send(Reset())
        return lost


@asynccontextmanager
async def executing(config: Config = CONFIG) -> AsyncIterator[House]:
    house = House(config)
    async with anyio.create_task_group() as group:
        group.start_soon(house.executor.run)
        yield house
        group.cancel_scope.cancel()
    assert all(process.poll() is not None for process in house.start.started)


async def test_a_spare_takes_over_and_another_one_waits() -> None:
    async with executing() as house:
        ready = await house.next(WorkerReady)
        assert ready.modules == ()  # the executor's business
        await until(lambda: house.spare.imported)
        worker, spare = house.start.started
        assert "SIGKILL" in (await house.kill(worker)).cause
        again = await house.next(WorkerReady)
        assert (again.pages, again.slots) == (ready.pages, ready.slots)
        assert again.phases["import"] < ready.phases["import"] / 2  # nothing was left to import
        await until(lambda: len(house.start.started) == 3 and house.spare.imported)
        assert spare.poll() is None and house.start.started[2].pid != spare.pid


async def test_a_spare_that_dies_is_replaced_and_harms_nobody() -> None:
    async with executing() as house:
        await house.next(WorkerReady)
        await until(lambda: house.spare.imported)
        worker, spare = house.start.started
        spare.kill()
        await until(lambda: len(house.start.started) == 3 and house.spare.imported)
        assert worker.poll() is None and not len(house.heard)
        await house.kill(worker)
        await house.next(WorkerReady)
        assert house.start.started[2].poll() is None


async def test_a_worker_that_dies_before_there_is_a_spare_is_replaced_as_well() -> None:
    async with executing() as house:
        for count in range(1, 4):
            await house.next(WorkerReady)
            assert len(house.start.started) >= count
            await house.kill(next(process for process in house.start.started if process.poll() is None))
        await house.next(WorkerReady)


async def test_without_the_option_there_is_no_spare() -> None:
    config = resolve({"model": "echo", "kv_tokens": 512, "device": "cpu"})  # only servers have it by default
    async with executing(config) as house:
        await house.next(WorkerReady)
        await anyio.wait_all_tasks_blocked()
        assert len(house.start.started) == 1
        await house.kill(house.start.started[0])
        await house.next(WorkerReady)
        assert len(house.start.started) == 2


@asynccontextmanager
async def keeping(start: Starter) -> AsyncIterator[Spare]:
    spare = Spare(CONFIG, start, delay=0.0)
    async with anyio.create_task_group() as group:
        group.start_soon(spare.run)
        yield spare
        group.cancel_scope.cancel()
    assert all(process.poll() is not None for process in start.started)


async def test_there_is_none_before_the_worker_is_ready() -> None:
    start = Starter()
    async with keeping(start) as spare:
        await anyio.wait_all_tasks_blocked()
        assert not start.started
        assert await spare.take() is None  # for a worker that has died before it was ready
        spare.want(())
        await until(lambda: len(start.started) == 1)


async def test_spares_that_never_live_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    start = Starter(script="import sys; sys.exit(3)")
    spare = Spare(CONFIG, start, delay=0.0)
    spare.want(())
    with anyio.fail_after(60):
        await spare.run()
    assert len(start.started) == MOST_LOST
    assert "it exited with code 3" in caplog.text and "no spare worker is kept any more" in caplog.text
    assert await spare.take() is None


async def test_a_system_that_starts_no_more_processes_is_no_failure_of_the_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spare_module, "MOST_LOST", 1)

    def start() -> tuple[socket.socket, Process]:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    spare = Spare(CONFIG, start, delay=0.0)
    spare.want(())
    with anyio.fail_after(60):
        await spare.run()
    assert "it cannot be started" in caplog.text and "Resource temporarily unavailable" in caplog.text
    assert await spare.take() is None


async def test_a_module_that_breaks_an_import_ends_the_spare_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "breaks_on_import.py").write_text("raise RuntimeError('not twice')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(spare_module, "MOST_LOST", 1)
    spare = Spare(CONFIG, Starter(), delay=0.0)
    spare.want(("there_is_no_such_module", "breaks_on_import"))
    with anyio.fail_after(60):
        await spare.run()
    assert "RuntimeError: not twice" in caplog.text


async def test_where_memory_is_short_no_spare_is_started_and_one_that_waits_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    free = spare_module.LEAST_MEMORY - 1
    monkeypatch.setattr(spare_module, "free_memory", lambda: free)
    monkeypatch.setattr(spare_module, "LOOK_SECONDS", 0.02)
    start = Starter(script="import time; time.sleep(60)")
    async with keeping(start) as spare:
        spare.want(())
        await until(lambda: "no spare worker: less than 1024 MiB" in caplog.text)
        assert not start.started
        free += 1
        await until(lambda: len(start.started) == 1)
        free -= 1
        await until(lambda: start.started[0].poll() is not None)
        assert "ending the spare worker" in caplog.text
        assert await spare.take() is None


# ── the process ──────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def process_of(prepare: Preload) -> AsyncIterator[tuple[subprocess.Popen[bytes], BlockingFrames[Any]]]:
    ours, process = spawn("engine.worker")
    try:
        with ours:
            ours.settimeout(60)
            frames: BlockingFrames[Any] = BlockingFrames(ours, receives=FromWorker)
            frames.send(prepare)
            yield process, frames
    finally:
        process.kill()
        process.wait()


async def test_a_spare_imports_what_the_worker_has_and_stays_out_of_the_way() -> None:
    usual = OOM_SCORE.read_text()
    async with process_of(Preload(CONFIG, ("engine_plugins.models.echo", "wave"))) as (process, frames):
        assert frames.receive() == Pong()
        place = Path("/proc", str(process.pid))
        assert (place / "oom_score_adj").read_text().strip() == "1000"
        assert "libtorch_cpu" in (place / "maps").read_text()
        opened = [os.readlink(descriptor) for descriptor in (place / "fd").iterdir()]
        assert not [path for path in opened if path.startswith("/dev/nvidia")]  # a context of CUDA would hold it
        frames.send(Boot(CONFIG))
        ready = frames.receive()
        assert isinstance(ready, WorkerReady), ready
        assert "engine_plugins.models.echo" not in ready.modules  # it was there already
        assert (place / "oom_score_adj").read_text() == usual
        niceness = int((place / "stat").read_text().rpartition(")")[2].split()[16])
        assert niceness == os.getpriority(os.PRIO_PROCESS, 0)


async def test_a_worker_says_what_its_start_imported() -> None:
    ours, process = spawn("engine.worker")
    with ours:
        ours.settimeout(60)
        frames: BlockingFrames[Any] = BlockingFrames(ours, receives=FromWorker)
        frames.send(Boot(CONFIG))
        ready = frames.receive()
    assert process.wait(30) == 0
    assert isinstance(ready, WorkerReady)
    assert {"engine_plugins.models.echo", "engine_plugins.checkpoints.echo"} <= set(ready.modules)
    assert "torch" not in ready.modules  # that comes with the worker itself


def test_modules_that_only_their_importer_finds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(sys.modules)
    monkeypatch.setitem(sys.modules, "made_up", type(sys)("made_up"))
    monkeypatch.delitem(sys.modules, "engine.worker.spare")
    import engine.worker.spare  # noqa: F401

    assert imported_since(known - {"engine.worker.spare"}) == ("engine.worker.spare",)


def test_a_spare_ends_with_its_parent() -> None:
    """SIGKILL of the parent: nobody says goodbye to the spare."""
    script = """
import sys, time
from engine.config import resolve
from engine.messages import FromWorker, Preload
from engine.runtime.channel import BlockingFrames
from engine.runtime.process import spawn
sock, process = spawn("engine.worker")
frames = BlockingFrames(sock, receives=FromWorker)
frames.send(Preload(resolve({"model": "echo"})))
frames.receive()
print(process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    spare = int(parent.stdout.readline())
    assert not gone(spare)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(3000):
        if gone(spare):
            return
        time.sleep(0.01)
    raise AssertionError("the spare outlives its parent")
