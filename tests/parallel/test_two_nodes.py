"""Two hosts behind one server: replies as of one rank, failures named with rank and host, and no process left behind.

Node 0 is on this host. Node 1 is a second start on it, or in a network namespace behind a pair of virtual interfaces,
whose link is cut and restored. `make test` has one case; the rest is for `make test-parallel`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from nodes import TOKEN_OF_TESTS, free_port
from oracle import tiny_model
from test_processes import children
from tokenizers import Tokenizer, models

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="several hosts need Linux")]
SECONDS = 120
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8] * 9]
OPTIONS = {"device": "cpu", "threads": 1, "max_running": 4, "kv_tokens": 4096, "page_size": 4, "tp": 2, "nnodes": 2}
LENGTH = 24
SPACE = "engine-test-node1"
HERE, THERE = "10.213.77.1", "10.213.77.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama with a tokenizer of one letter a token."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_model("Llama", num_attention_heads=4, tie_word_embeddings=False, max_position_embeddings=4096)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({chr(0x100 + i): i for i in range(96)}, unk_token=chr(0x100)))
    words.save(str(folder / "tokenizer.json"))
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(LENGTH):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert len({token for ids in wanted for token in ids}) > 4  # decided, and not all alike
    (folder / "wanted.json").write_text(json.dumps(wanted))
    return folder


class Host:
    """One start of `engine serve` and its log; `prefix` puts it elsewhere."""

    def __init__(self, folder: Path, number: int, rendezvous: str, *options: str, prefix: tuple[str, ...] = ()) -> None:
        self.log = folder / f"node{number}-{time.monotonic_ns()}.log"
        command = [*prefix, sys.executable, "-m", "engine", "serve", "--model", str(folder)]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        command += ["--rendezvous", rendezvous, "--node-rank", str(number), *options]
        with self.log.open("w") as log:
            environ = {**os.environ, "ENGINE_TOKEN": TOKEN_OF_TESTS}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)

    def said(self, pattern: str, count: int = 1) -> str:
        """The `count`-th line of the log that matches, once it is there."""
        until = time.monotonic() + SECONDS
        while len(found := [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]) < count:
            assert time.monotonic() < until, f"no {pattern!r} within {SECONDS} s in:\n{self.log.read_text()}"
            assert self.process.poll() is None or self.log.read_text().count(pattern), self.log.read_text()
            time.sleep(0.02)
        return found[count - 1]

    def worker(self) -> int:
        (pid,) = (pid for pid, name in children(self.process.pid).items() if name == "engine.worker")
        return pid

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(SECONDS)


class Server:
    """Node 0, and what is asked of it."""

    def __init__(self, folder: Path, host: Host, port: int) -> None:
        self.host = host
        self.wanted: list[list[int]] = json.loads((folder / "wanted.json").read_text())
        self._url = f"http://127.0.0.1:{port}/generate"

    def ask(self, number: int) -> Any:
        """The reply to a prompt: its ids, or the error."""
        body = {"input_ids": PROMPTS[number], "sampling_params": sampling(LENGTH)}
        with self._post(body) as answer:
            reply = json.load(answer)
        return reply.get("output_ids") or reply

    def _post(self, body: dict[str, Any]) -> Any:
        try:
            return urlopen(Request(self._url, json.dumps(body).encode()), timeout=SECONDS)
        except HTTPError as error:
            return error

    def serves(self) -> None:
        """Until a reply comes: what waits is served once the group has been started again."""
        until = time.monotonic() + SECONDS
        while isinstance(reply := self.ask(0), dict):
            assert time.monotonic() < until, reply
        assert [self.ask(number) for number in range(len(PROMPTS))] == self.wanted

    @contextmanager
    def open_reply(self) -> Iterator[Iterator[str]]:
        """The lines of a long reply of which the first is there."""
        body = {"input_ids": PROMPTS[0], "sampling_params": sampling(3000), "stream": True}
        with self._post(body) as answer:
            lines = (line.decode() for line in answer if line.strip())
            assert "error" not in (first := next(lines)), first
            yield lines


def sampling(length: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}


@contextmanager
def serving(folder: Path, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> Iterator[tuple[Server, Host]]:
    """Node 0, and node 1 where `prefix` starts it. No process is left."""
    port, rendezvous = free_port(), f"{address}:{free_port()}"
    with ExitStack() as ending:
        hosts = [
            Host(folder, 0, rendezvous, "--port", str(port)),
            Host(folder, 1, rendezvous, prefix=prefix),
        ]
        for host in hosts:
            ending.callback(host.process.wait)
            ending.callback(host.process.kill)
        hosts[0].said("ready after")
        yield Server(folder, hosts[0], port), hosts[1]


def gone(pid: int) -> None:
    """Until a process has ended."""
    until = time.monotonic() + SECONDS
    while (path := Path(f"/proc/{pid}/stat")).exists():
        try:
            if path.read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        assert time.monotonic() < until, f"process {pid} is still there"
        time.sleep(0.02)


def test_two_nodes_reply_as_one_rank_name_a_dead_one_and_end_together(folder: Path) -> None:
    with serving(folder) as (server, other):
        assert [server.ask(number) for number in range(len(PROMPTS))] == server.wanted
        with server.open_reply() as lines:
            os.kill(other.worker(), signal.SIGKILL)
            assert "rank 1 of 2 (node 1 at 127.0.0.1): it was killed by SIGKILL" in list(lines)[-1]
        other.said("starting rank 1", 2)
        workers = [*children(server.host.process.pid), *children(other.process.pid)]
        assert server.host.end() == 0
        assert other.process.wait(SECONDS) == 0
        for pid in workers:
            gone(pid)


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_a_killed_host_leaves_nothing_and_comes_back(folder: Path) -> None:
    with serving(folder) as (server, other):
        worker = other.worker()
        rendezvous = f"127.0.0.1:{server.host.said('nodes join at').split(':')[-1].split()[0]}"
        with server.open_reply() as lines:
            other.process.kill()
            assert "rank 1 of 2 (node 1 at 127.0.0.1): its host is gone" in list(lines)[-1]
        gone(worker)
        server.host.said("waiting for node 1 of 2", 2)
        back = Host(folder, 1, rendezvous)
        try:
            server.serves()
            worker = back.worker()
            server.host.process.kill()  # no farewell: it is called again
            gone(worker)
            back.said("node 0 is gone; its workers here have ended, and it is called again")
            assert back.end() == 0
        finally:
            back.process.kill()
            back.process.wait()


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_with_who_waits_for_it_and_may_go_on(folder: Path, rank: int) -> None:
    with serving(folder) as (server, other):
        pid = (server.host, other)[rank].worker()
        place = (r"", r" \(node 1 at 127.0.0.1\)")
        with ThreadPoolExecutor() as pool, server.open_reply():
            began = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                line = server.host.said(f"no sign of life from rank {rank}{place[rank]} for")
                print(f"a stopped rank {rank} is named after {time.monotonic() - began:.1f} s: {line}")
                assert re.search(
                    rf"rank {1 - rank}{place[1 - rank]} is in all_\w+ \d+ of step \d+ for \d+ s "
                    rf"and waits for rank {rank}",
                    line,
                )
                waiting = pool.submit(server.ask, 0)
            finally:
                os.kill(pid, signal.SIGCONT)
            server.host.said("all ranks go on")
            assert waiting.result() == server.wanted[0]


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_each_rank_is_killed_twenty_times_under_load(folder: Path) -> None:
    with serving(folder) as (server, other), ThreadPoolExecutor() as pool:
        for number in range(40):
            rank = number % 2
            asked = [pool.submit(server.ask, prompt) for prompt in (0, 1, 2)]
            with server.open_reply() as lines:
                began = time.monotonic()
                os.kill((server.host, other)[rank].worker(), signal.SIGKILL)
                place = ("", " (node 1 at 127.0.0.1)")[rank]
                cause = f"rank {rank} of 2{place}: it was killed by SIGKILL"
                assert cause in list(lines)[-1]
                named = time.monotonic() - began
            for prompt, reply in enumerate(asked):  # whole and right, or failed for this cause
                said = reply.result()
                assert said == server.wanted[prompt] or cause in json.dumps(said)
            server.serves()
            print(f"kill {number} of rank {rank}: named after {named:.1f} s, served {time.monotonic() - began:.1f} s")


# ── a link between network namespaces ────────────────────────────────────────────────────────


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[tuple[str, ...]]:
    """A network namespace behind a pair of interfaces; what starts a process in it."""
    name = f"{SPACE}-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "add", "engine-t0", "type", "veth", "peer", "name", "engine-t1", "netns", name)
        ip("addr", "add", f"{HERE}/30", "dev", "engine-t0")
        ip("link", "set", "engine-t0", "up")
        ip("-n", name, "addr", "add", f"{THERE}/30", "dev", "engine-t1")
        for interface in ("engine-t1", "lo"):
            ip("-n", name, "link", "set", interface, "up")
        yield ("ip", "netns", "exec", name)
    finally:
        ip("netns", "del", name)


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", ["engine-t0", "engine-t1"])
def test_a_link_that_is_cut_fails_what_runs_and_is_served_once_restored(
    folder: Path, link: tuple[str, ...], end: str
) -> None:
    space = ("-n", link[-1]) if end == "engine-t1" else ()
    with serving(folder, HERE, link) as (server, other):
        assert [server.ask(number) for number in range(len(PROMPTS))] == server.wanted
        worker = other.worker()
        with server.open_reply() as lines, ThreadPoolExecutor() as pool:
            began = time.monotonic()
            ip(*space, "link", "set", end, "down")
            last = list(lines)[-1]
            assert f"rank 1 of 2 (node 1 at {THERE}): its host is gone: no word from it for" in last
            print(f"a cut link is named after {time.monotonic() - began:.1f} s: {last}")
            gone(worker)
            print(f"its worker has ended after {time.monotonic() - began:.1f} s")
            server.host.said("waiting for node 1 of 2", 2)
            waiting = pool.submit(server.ask, 0)
            ip(*space, "link", "set", end, "up")
            restored = time.monotonic()
            assert waiting.result() == server.wanted[0]
            print(f"served {time.monotonic() - restored:.1f} s after the link was restored")
        server.serves()
        assert server.host.end() == 0
        assert other.process.wait(SECONDS) == 0
