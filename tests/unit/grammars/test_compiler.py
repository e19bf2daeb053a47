"""The process that compiles grammars: children side by side, each ended at its deadline, and what is said of them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from engine.actors.compiler import CompilerActor
from engine.config import Config, GrammarOptions, ModelOptions
from engine.conversation.calls import Tool, allowed, either, forced
from engine.grammars.compiler import helpers
from engine.messages.assets import Make
from engine.messages.control import Boot, Fatal, WorkerReady
from engine.messages.grammars import GRAMMAR, Compile, Compiled, PackedGrammar, grammar_need
from engine.params.grammar import Grammar
from engine.plugin.registry import Plugins, resolve
from engine.runtime.channel import BlockingFrames, open_channel

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork"),
]
Answer = Compiled | Fatal
SOURCES = ("one", "two", "three")
ODD = [sys.executable, str(Path(__file__).parents[2] / "lib" / "slow_compiler.py")]


def config(seconds: float = 10.0, helpers: int = 2) -> Config:
    options = GrammarOptions(grammar_seconds=seconds, grammar_helpers=helpers)
    return Config(model=ModelOptions(model="echo"), grammar=options)


def start(command: list[str] = ODD) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    return ours, process


@contextmanager
def compiler(command: list[str], given: Config, grammars: Sequence[Grammar]) -> "Iterator[BlockingFrames[Answer]]":
    """A compiler that was sent `grammars`, numbered from 1."""
    sock, process = start(command)
    with process, sock:
        sock.settimeout(60)
        frames: BlockingFrames[Answer] = BlockingFrames(sock, receives=Answer)
        frames.send(Boot(given))
        for number, grammar in enumerate(grammars, start=1):
            frames.send(Compile(number, grammar, 257))
        yield frames
        sock.close()
        assert process.wait(30) == 0


def compiling(*sources: str, seconds: float = 10.0, helpers: int = 2) -> Any:
    """A compiler of odd grammars that was sent these."""
    return compiler(ODD, config(seconds, helpers), [Grammar("regex", source) for source in sources])


def answers(frames: "BlockingFrames[Answer]", count: int) -> dict[int, Compiled]:
    found = {}
    for _ in range(count):
        answer = frames.receive()
        assert isinstance(answer, Compiled), answer
        found[answer.number] = answer
    return found


def test_each_is_compiled_in_a_process_of_its_own() -> None:
    with compiling(*SOURCES) as frames:
        found = answers(frames, 3)
    assert [found[number].grammar for number in (1, 2, 3)] == [Grammar("regex", text) for text in SOURCES]
    assert {answer.engine for answer in found.values()} == {"odd"}
    assert len({answer.packed for answer in found.values()}) == 3


def test_one_that_takes_too_long_is_ended_and_others_go_on_beside_it() -> None:
    with compiling("spin", "one", "sleep 60", "two", seconds=0.5) as frames:
        found = answers(frames, 4)
    for number in (1, 3):
        answer = found[number]
        assert (answer.status, answer.code, answer.lasting) == (400, "grammar_timeout", False)
        assert "0.5 s that --grammar-seconds allows" in answer.cause and "regex" in answer.cause
    assert "had a processor for 0.0 s, as the server is busy" in found[3].cause  # for want of one, or asleep
    assert found[2].grammar is not None and found[4].grammar is not None


def test_a_slow_one_holds_up_no_other_even_on_one_processor() -> None:
    assert [helpers(cores) for cores in (1, 2, 4, 8, 64)] == [2, 2, 2, 4, 8]
    given = Config(model=ModelOptions(model="echo"), grammar=GrammarOptions(grammar_seconds=20.0))
    with compiler(ODD, given, [Grammar("regex", source) for source in ("sleep 5", "one", "two")]) as frames:
        found = list(answers(frames, 3))
    assert found == [2, 3, 1]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="a system without a priority below all others")
def test_one_that_takes_long_gives_way_to_all_others() -> None:
    sock, process = start()
    with process, sock:
        frames: BlockingFrames[Answer] = BlockingFrames(sock, receives=Answer)
        frames.send(Boot(config()))
        for number, source in enumerate(("sleep 60", "spin"), start=1):
            frames.send(Compile(number, Grammar("regex", source), 257))
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = children(process.pid)
            if len(found) == 2 and all(os.sched_getscheduler(child) == os.SCHED_IDLE for child in found):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("they do not give way")
        assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER  # what forks them does not
        groups = [Path(f"/proc/{child}/autogroup") for child in found]
        for group in groups if all(group.exists() for group in groups) else ():
            while time.monotonic() < end and not group.read_text().endswith("nice 19\n"):
                time.sleep(0.05)
            assert group.read_text().endswith("nice 19\n")
        sock.close()
        assert process.wait(30) == 0


def children(parent: int) -> list[int]:
    """The processes that `parent` has forked."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_as_many_run_at_a_time_as_there_are_helpers() -> None:
    with compiling("sleep 0.3", "sleep 0.3", "sleep 0.3", helpers=3) as frames:
        began = time.monotonic()
        answers(frames, 3)
        together = time.monotonic() - began
    with compiling("sleep 0.3", "one", helpers=1) as frames:
        first = frames.receive()
    assert isinstance(first, Compiled) and first.number == 1  # the other waited for it
    assert together < 30  # that they overlap is seen in bench/grammars/engines.py: no test asserts a duration


@pytest.mark.parametrize(
    ("source", "code", "says", "lasting"),
    [
        ("refuse this", "unsupported_keyword", "this is not known", True),
        ("nothing", "invalid_grammar", "no reply can match this regex; correct it", True),
        ("broken", "invalid_grammar", "no reply can match this regex: too complex", True),
        ("memory", "grammar_too_large", "regex", True),
        ("abort", "grammar_too_large", "breaks its compiler", False),
        ("raise that", "grammar_too_large", "breaks its compiler", False),
    ],
)
def test_what_goes_wrong_is_said_and_is_its_senders_alone(source: str, code: str, says: str, lasting: bool) -> None:
    with compiling(source, "one") as frames:
        found = answers(frames, 2)
    assert (found[1].status, found[1].code, found[1].lasting) == (400, code, lasting), found[1]
    assert says in found[1].cause and found[1].grammar is None
    assert found[2].grammar is not None


def test_an_engine_is_made_once_and_outside_of_the_deadline() -> None:
    with compiling("pass", "pass", "one", seconds=0.5, helpers=1) as frames:
        found = answers(frames, 3)
    assert [found[number].engine for number in (1, 2, 3)] == ["second", "second", "odd"]


def test_real_engines_compile_and_refuse() -> None:
    schema = Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}')
    asked = [schema, Grammar("json_schema", '{"not":{"const":1}}'), Grammar("regex", "(a")]
    with compiler([sys.executable, "-m", "engine.grammars.compiler"], config(), asked) as frames:
        found = answers(frames, 3)
    assert found[1].grammar is not None and '"additionalProperties":false' in found[1].grammar.source
    assert found[2].code == "unsupported_keyword" and '["not"]' in found[2].cause
    assert found[3].code == "invalid_grammar" and "unclosed group" in found[3].cause


def test_of_tools_and_a_format_that_is_blamed_which_is_refused() -> None:
    syntax = resolve(Plugins.load().entries("parsers")["hermes"].target).syntax
    good, bad = {"type": "object", "properties": {}}, {"not": {"const": 1}}
    asked = [
        either([Tool("f", parameters)], syntax, Grammar("json_schema", json.dumps(format)), parallel=True)
        for parameters, format in ((good, bad), (bad, good), (good, good))
    ]
    with compiler([sys.executable, "-m", "engine.grammars.compiler"], config(), asked) as frames:
        found = answers(frames, 3)
    assert [found[number].param for number in (1, 2)] == ["format", "grammar"]
    assert "does not take the json_schema" in found[1].cause and found[1].code == "unsupported_keyword"
    assert found[3].grammar is not None


def test_a_refusal_names_the_tool_whose_parameters_it_is_about() -> None:
    bad = {"type": "object", "properties": {"id": {"const": 2**64}, "x": {"not": {"const": 1}}}}
    tools = [Tool("first", {"type": "object"}), Tool("second", bad, strict=True), Tool("third", bad)]
    plain = Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}')
    asked = []
    for name in ("hermes", "llama3_json", "mistral", "deepseek_v3", "pythonic"):
        syntax = resolve(Plugins.load().entries("parsers")[name].target).syntax
        asked += [forced(tools, syntax, parallel=True), either(tools, syntax, plain, parallel=True)]
        asked += [allowed(tools, syntax)] if syntax.trigger else []
    with compiler([sys.executable, "-m", "engine.grammars.compiler"], config(), asked) as frames:
        found = answers(frames, len(asked))
    for number in range(1, len(asked) + 1):
        assert found[number].cause.startswith("the parameters of the tool second: "), found[number].cause
        assert "const has the number 18446744073709551616" in found[number].cause and found[number].param == "grammar"


READY = WorkerReady(1, 1, 1, 1, 1, vocab_size=64, kv_bytes_per_token=4, device="none", attention="none", phases={})


def make(number: int, source: str) -> Make:
    return Make(GRAMMAR, number, grammar_need(Grammar("regex", source)).content)


async def test_the_actor_starts_it_when_it_is_needed_and_again_when_it_is_gone() -> None:
    to_compiler, inbox = open_channel()
    to_scheduler, answered = open_channel()
    processes: list[subprocess.Popen[bytes]] = []

    def begin() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
        sock, process = start()
        processes.append(process)
        return sock, process

    actor = CompilerActor(config(), inbox, to_scheduler, begin)
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        await to_compiler.send(READY)
        await anyio.sleep(0.05)
        assert not processes
        with anyio.fail_after(60):
            await to_compiler.send(make(1, "one"))
            assert (await answered.receive()).number == 1
            await to_compiler.send(make(2, "sleep 60"))
            await anyio.sleep(0.2)
            processes[0].kill()
            lost = await answered.receive()
            assert (lost.number, lost.status, lost.code, lost.lasting) == (2, 503, "compiler_lost", False)
            assert "SIGKILL" in lost.cause
            await to_compiler.send(make(3, "two"))
            payload = (await answered.receive()).payload
            assert msgspec.msgpack.decode(payload, type=PackedGrammar).grammar == Grammar("regex", "two")
        group.cancel_scope.cancel()
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
