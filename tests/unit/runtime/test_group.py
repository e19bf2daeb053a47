"""A group of workers, as real processes without a model: one life, one cause, and the least of what all can do."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import fake_worker
import pytest
from msgspec.structs import replace

from engine.actors.executor import ExecutorActor
from engine.config import Config, resolve
from engine.messages.assets import Load, Loaded
from engine.messages.control import Answer, Ask, Fatal, Reset, WorkerLost, WorkerReady, WorkerSilent
from engine.messages.step import TOKEN, SlotAdmit, StepDone
from engine.params.sampling import Sampling
from engine.runtime import group as group_module
from engine.runtime.channel import channel, open_channel
from engine.runtime.process import Process
from engine.testing.fake import FakeDevice
from engine.testing.steps import step_plan

pytestmark = pytest.mark.anyio
SECONDS = 60


class House:
    """An executor of `ranks` fake workers, whose script a test may change between lives."""

    def __init__(self, script: dict[str, Any], ranks: int, *, tcp: bool, **options: Any) -> None:
        self.script = script
        self.tcp = tcp
        self.processes: list[subprocess.Popen[bytes]] = []
        self.config: Config = resolve({"model": "echo", "tp": ranks, "spare_worker": True, **options})
        self.to_executor, inbox = channel(8)
        outbox, self.heard = open_channel()
        self.executor = ExecutorActor(self.config, inbox, outbox, self.start, spare_seconds=0.0)

    def start(self) -> tuple[socket.socket, Process]:
        ours, theirs = _tcp_pair() if self.tcp else socket.socketpair()
        command = [sys.executable, fake_worker.__file__, json.dumps(self.script), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.processes.append(process)
        return ours, process

    async def next(self, kind: type[Any]) -> Any:
        with anyio.fail_after(SECONDS):
            message = await self.heard.receive()
        assert isinstance(message, kind), message
        return message

    async def step(self, number: int) -> None:
        """One row of one token, whose next one is 98."""
        admits = (SlotAdmit(0, array("i", [97]).tobytes(), Sampling(0.0, 0, 1.0, 0.0, 1)),)
        await self.to_executor.send(step_plan(number, [(0, 0, 1, TOKEN)], admits))


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


@asynccontextmanager
async def executing(
    script: dict[str, Any], ranks: int = 2, *, tcp: bool = False, **options: Any
) -> AsyncIterator[House]:
    house = House(script, ranks, tcp=tcp, **options)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.executor.run)
        yield house
        tasks.cancel_scope.cancel()
    assert all(process.poll() is not None for process in house.processes)


def inode(address: str) -> int:
    """Which file is at `address` now; 0 if there is none."""
    path = Path(address.removeprefix("file://"))
    return path.stat().st_ino if path.exists() else 0


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_all_ranks_agree_on_the_fewest_pages_and_run_every_step(tcp: bool, tmp_path: Path) -> None:
    script = {
        "folder": str(tmp_path),
        "0": {"ready": {"max_model_len": 48, "phases": {"weights": 2.0}}},
        "1": {"pages": 30, "ready": {"slots": 3, "phases": {"weights": 3.0}}},
        "2": {"pages": 70},
    }
    async with executing(script, ranks=3, tcp=tcp) as house:
        ready = await house.next(WorkerReady)
        assert (ready.pages, ready.slots, ready.max_model_len, ready.max_step_tokens) == (30, 3, 48, 64)
        assert (ready.kv_bytes_per_token, ready.device) == (6, "3 × none")
        assert ready.phases == {"weights": 3.0, "import": 0.0}
        said = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
        assert {(pages, world) for pages, world, _ in said} == {("30", "3")}
        (meeting,) = {place for _, _, place in said}
        assert meeting.startswith("file:///") and Path(meeting.removeprefix("file://")).parent.is_dir()
        met = inode(meeting)
        assert met or sys.platform != "linux"  # elsewhere the first rank makes the file
        for number in range(20):
            await house.step(number)
            done = await house.next(StepDone)  # of one rank alone
            assert (done.step, array("i", done.tokens)[0]) == (number, 98)
        assert not len(house.heard)
        assert len(house.processes) == 3  # no spare
    assert not met or inode(meeting) != met


async def test_the_result_of_a_step_is_that_of_all_copies_of_attention_in_the_order_of_its_rows() -> None:
    script = {"0": {"hang_at": 2, "hang_seconds": 0.3}}  # the other copy is done with step 3 by then
    async with executing(script, ranks=4, dp_attention=2) as house:
        ready = await house.next(WorkerReady)
        assert ready.kv_bytes_per_token == 8
        scored = Sampling(0.0, 0, 1.0, 0.0, 1, logprobs=1, prompt_logprobs=0)
        ids = {0: [10], 1: [20, 21], 2: [30], 3: [40, 41, 42]}
        admits = [SlotAdmit(slot, array("i", each).tobytes(), scored, len(each)) for slot, each in ids.items()]
        rows = [(slot, 0, len(each), TOKEN) for slot, each in ids.items()]
        alone = FakeDevice().step(step_plan(1, rows, admits))
        await house.to_executor.send(step_plan(1, rows, admits))
        assert await house.next(StepDone) == replace(alone, seconds=2.0)  # rank 2 is the first of the second copy
        for number, slot in ((2, 1), (3, 3)):  # the other copy has no row
            await house.to_executor.send(step_plan(number, [(slot, len(ids[slot]), 1, TOKEN)]))
        done = [await house.next(StepDone) for _ in range(2)]
        assert [(each.step, array("i", each.tokens).tolist()) for each in done] == [(2, [23]), (3, [44])]
        assert [each.logprobs[0].row for each in done] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_whichever_rank_dies_all_are_ended_for_its_cause_and_started_again(rank: int) -> None:
    async with executing({}, ranks=3) as house:
        ready = await house.next(WorkerReady)
        first = list(house.processes)
        os.kill(first[rank].pid, signal.SIGKILL)
        lost = await house.next(WorkerLost)
        assert lost.cause.startswith(f"rank {rank} of 3: it was killed by SIGKILL")
        assert all(process.poll() is not None for process in first)
        await house.to_executor.send(Reset())
        assert (await house.next(WorkerReady)).pages == ready.pages
        assert len(house.processes) == 6
        await house.step(0)
        await house.next(StepDone)


async def test_a_rank_that_dies_without_a_word_is_the_cause_of_those_that_have_lost_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 says what a collective says whose peer has gone, and before rank 1's end is seen."""
    script = {"0": {"fail_at": 1, "says": "connection closed by peer"}, "1": {"die_at": 1, "die_after": 0.5}}
    monkeypatch.setattr(group_module, "GRACE_SECONDS", SECONDS)
    async with executing(script) as house:
        await house.next(WorkerReady)
        await house.step(1)
        cause = "rank 1 of 2: it exited with code 7"
        assert [(await house.next(WorkerLost)).cause] == [cause]


async def test_the_first_of_two_failures_is_the_cause() -> None:
    script = {
        "0": {"fail_at": 1, "says": "connection closed by peer", "fail_after": 0.2},
        "1": {"fail_at": 1, "says": "out of memory"},
    }
    async with executing(script) as house:
        await house.next(WorkerReady)
        await house.step(1)
        assert (await house.next(WorkerLost)).cause == "rank 1 of 2: out of memory"


async def test_a_rank_that_cannot_start_ends_the_start_of_all() -> None:
    script = {"0": {"late": SECONDS}, "1": {"starts_not": "no memory for the KV cache"}}
    async with executing(script) as house:
        fatal = await house.next(Fatal)
        assert (fatal.actor, fatal.cause) == ("worker", "rank 1 of 2: no memory for the KV cache")
        with anyio.fail_after(SECONDS):
            while any(process.poll() is None for process in house.processes):
                await anyio.sleep(0.01)


async def test_ranks_of_different_models_are_refused_with_both_values() -> None:
    async with executing({"1": {"ready": {"vocab_size": 300}}}) as house:
        cause = (await house.next(Fatal)).cause
        assert "rank 1 has a vocab size of 300 and rank 0 one of 257" in cause and "same model" in cause


async def test_a_start_that_waits_says_for_which_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(group_module, "PING_SECONDS", 0.05)
    monkeypatch.setattr(group_module, "WAIT_SECONDS", 0.1)
    async with executing({"2": {"late": 4}}, ranks=3) as house:
        await house.next(WorkerReady)
        assert [record.message for record in caplog.records if "still to start" in record.message][-1] in (
            "rank 2 of 3 still to start; the others wait"
        )


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_silent_rank_is_named_until_it_speaks_again(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "PING_SECONDS", 0.05)
    async with executing({str(rank): {"hang_at": 1, "hang_seconds": 2}}, stall_seconds=0.5) as house:
        await house.next(WorkerReady)
        await house.step(1)
        messages: list[Any] = []
        with anyio.fail_after(SECONDS):
            while len(messages) < 3:
                messages.append(await house.heard.receive())
        silent, again = (message for message in messages if isinstance(message, WorkerSilent))
        assert silent.seconds > 0.5 and silent.cause == f"no word from rank {rank} of 2 for {silent.seconds:.0f} s"
        assert again.seconds == 0
        assert sum(isinstance(message, StepDone) for message in messages) == 1


async def test_ranks_that_wait_are_named_and_ended_if_that_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_module, "PING_SECONDS", 0.05)
    script = {"0": {"beats": [[45, "all_reduce", 123, 90.0]]}, "1": {"beats": [[45, "", 122, 0.0]]}}
    async with executing(script, stall_seconds=0.5) as house:
        await house.next(WorkerReady)
        told = r"rank 0 is in all_reduce 123 of step 45 for 9\d s and waits for rank 1, in no collective of step 45"
        assert re.fullmatch(told, (await house.next(WorkerSilent)).cause)
        assert re.fullmatch(told, (await house.next(WorkerLost)).cause)


async def test_questions_are_answered_once_by_all_and_refused_with_the_rank_that_cannot() -> None:
    async with executing({}) as house:
        await house.next(WorkerReady)
        await house.to_executor.send(Ask(5, b"?"))
        await house.to_executor.send(Load("grammar", 5, b""))
        assert await house.next(Answer) == Answer(5, b"rank 0")
        assert await house.next(Loaded) == Loaded("grammar", 5)
    async with executing({"1": {"refuses": "no room"}}) as house:
        await house.next(WorkerReady)
        await house.to_executor.send(Load("grammar", 1, b""))
        assert await house.next(Loaded) == Loaded("grammar", 1, "rank 1 of 2: no room")
