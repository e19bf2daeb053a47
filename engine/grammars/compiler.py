"""`python -m engine.grammars.compiler FD`: compiles grammars in processes that can be killed, for the peer on socket
FD.

    Compile ──> this process: vocabulary and engines, ready made ──fork──> child: compiles one grammar, and ends
    Compiled <─────────────────────────────────────────────────pipe───────┘

The first frame is Boot. A grammar may run for ever or use all memory, in a library that cannot be interrupted. So each
compiles in a child of its own, which the kernel ends at the deadline and whose memory is limited. A fork costs some
milliseconds, because nothing is imported or read again. Several children run at once, so that a slow one does not hold
up others. A child that takes long gives way to everything else on the machine. Left out: systems without fork.
"""

import logging
import math
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np

from engine.config import Config
from engine.conversation.calls import parameters_in
from engine.errors import EngineError, PluginError, RequestError
from engine.grammars.closed import prepared
from engine.grammars.engines import Engines, Unmade, grammar_engines
from engine.grammars.vocabulary import read_vocabulary
from engine.logs import set_up_logging
from engine.messages.control import Boot, Fatal
from engine.messages.grammars import Compile, Compiled
from engine.params.grammar import Grammar
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.specs import CompiledGrammar
from engine.runtime.channel import BlockingFrames
from engine.runtime.processors import processors

log = logging.getLogger("engine.grammars")

FEWEST_HELPERS, MOST_HELPERS = 2, 8
PATIENCE = 0.1  # seconds that a child may run before it gives way: most have ended long before
AGAIN = 0.2  # seconds until the system may be asked again to let one give way
MEMORY = 2 << 30  # bytes that a child may have beside what it begins with
MOST_PACKED = 64 << 20
DECODER = msgspec.msgpack.Decoder(Compiled)
ENCODER = msgspec.msgpack.Encoder()


@dataclass
class Child:
    """A compilation under way."""

    job: Compile
    process: int
    pipe: int
    began: float
    due: float  # when it is to give way; never, once it has
    said: bytearray = field(default_factory=bytearray)

    def give_way(self) -> None:
        """Run only on processors that nothing else wants: on Linux the child stops as soon as anything does.

        Niceness is not enough: a processor that runs a nice process counts as busy, so threads of the worker would
        share the next one. If Linux first shares the processors between sessions (autogroup), a priority counts only
        within a session. So the session, which is this child's own, is made nice."""
        self.due = math.inf
        group = Path(f"/proc/{self.process}/autogroup")
        try:
            if hasattr(os, "SCHED_IDLE"):
                os.sched_setscheduler(self.process, os.SCHED_IDLE, os.sched_param(0))
            else:
                os.setpriority(os.PRIO_PROCESS, self.process, 19)
            if group.exists():
                group.write_text("19")
        except BlockingIOError:  # it may be asked but ten times a second
            self.due = time.monotonic() + AGAIN
        except OSError as error:
            if not isinstance(error, ProcessLookupError | FileNotFoundError):  # it has just ended
                log.warning("a slow compilation does not give way to others: %s", error)


def helpers(cores: int) -> int:
    """The default number of grammars that compile at a time. It is never one, so that a slow one does not hold up
    others."""
    return max(FEWEST_HELPERS, min(MOST_HELPERS, cores // 2))


class Compiler:
    """The parent of all compilations."""

    def __init__(self, frames: BlockingFrames[Boot | Compile], descriptor: int, config: Config) -> None:
        self._frames = frames
        self._descriptor = descriptor
        self._config = config
        self._seconds = config.grammar.grammar_seconds
        self._most = config.grammar.grammar_helpers or helpers(processors())
        self._engines: Engines | None = None
        self._queue: deque[Compile] = deque()
        self._children: dict[int, Child] = {}  # by pipe

    def run(self) -> None:
        """Until the peer closes."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        try:
            while True:
                due = min((child.due for child in self._children.values()), default=math.inf)
                wait = None if due == math.inf else max(0.0, due - time.monotonic()) * 1e3 + 1
                for descriptor, _ in poll.poll(wait):
                    if descriptor != self._descriptor:
                        self._read(descriptor, poll)
                        continue
                    message = self._frames.receive()
                    if message is None:
                        return
                    assert isinstance(message, Compile), f"a compiler that runs got {type(message).__name__}"
                    self._queue.append(message)
                for child in self._children.values():
                    if time.monotonic() > child.due:
                        child.give_way()
                while self._queue and len(self._children) < self._most:
                    self._start(self._queue.popleft(), poll)
        finally:
            for child in self._children.values():
                os.kill(child.process, signal.SIGKILL)

    def _start(self, job: Compile, poll: "select.poll") -> None:
        engines = self._engines or self._ready(job.vocab_size)
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(self._descriptor)  # or the peer would not notice if this process, its own end, is gone
            compile_and_exit(job, engines, theirs, self._seconds)
        os.close(theirs)
        began = time.monotonic()
        self._children[ours] = Child(job, process, ours, began, began + PATIENCE)
        poll.register(ours, select.POLLIN)

    def _ready(self, vocab_size: int) -> Engines:
        began = time.perf_counter()
        plugins = Plugins.load(self._config.model.plugins)
        checkpoint = open_checkpoint(plugins, self._config.model.model)
        vocabulary = read_vocabulary(checkpoint, self._config, vocab_size)
        whitespace = self._config.grammar.json_whitespace
        engines = Engines(grammar_engines(plugins), vocabulary, threads=1, whitespace=whitespace)
        engines.warm_up()
        self._engines = engines
        log.info("grammar compiler ready after %.1f s: %d tokens", time.perf_counter() - began, vocab_size)
        return engines

    def _read(self, pipe: int, poll: "select.poll") -> None:
        """Read a child's output; at its end, pass it on."""
        child = self._children[pipe]
        if more := os.read(pipe, 1 << 20):
            child.said += more
            return
        poll.unregister(pipe)
        os.close(pipe)
        del self._children[pipe]
        _, status, usage = os.wait4(child.process, 0)
        seconds = time.monotonic() - child.began
        try:
            answer = DECODER.decode(child.said)
        except msgspec.DecodeError:  # it was ended before it had said all
            computed = usage.ru_utime + usage.ru_stime
            answer = self._ended(child.job, os.waitstatus_to_exitcode(status), computed)
        if answer.engine and answer.grammar is None:
            self._make(answer.engine, child.job)
        else:
            self._frames.send(msgspec.structs.replace(answer, seconds=seconds))

    def _make(self, engine: str, job: Compile) -> None:
        """Make the engine that `job` needs in this process, for all later children, and begin the job again."""
        assert self._engines is not None
        try:
            self._engines.named(engine)
            self._queue.appendleft(job)
        except PluginError as error:
            log.error("the grammar engine %s cannot be used: %s", engine, error)
            self._frames.send(Compiled(job.number, 0.0, status=400, code="no_grammar_engine", cause=str(error)))

    def _ended(self, job: Compile, code: int, computed: float) -> Compiled:
        """The answer for a child that ended without one, and had a processor for `computed` seconds."""
        kind = job.grammar.kind
        if code == -signal.SIGALRM:
            cause = f"the {kind} took longer to compile than the {self._seconds:g} s that --grammar-seconds allows; "
            if computed < self._seconds / 2:
                cause += f"of those it had a processor for {computed:.1f} s, as the server is busy: send it again, or "
            cause += "simplify it: bounds on lengths and counts are what costs most"
            return Compiled(job.number, 0.0, status=400, code="grammar_timeout", cause=cause, lasting=False)
        log.warning("a compilation of a %s ended with %d", kind, code)
        cause = f"the {kind} takes over {MEMORY >> 30} GiB of memory to compile, or breaks its compiler; simplify it"
        return Compiled(job.number, 0.0, status=400, code="grammar_too_large", cause=cause, lasting=False)


def compile_and_exit(job: Compile, engines: Engines, pipe: int, seconds: float) -> NoReturn:
    """The life of a child. It ends at once, past what the parent's code would do at its own end."""
    try:
        os.setsid()  # see Child.give_way
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        limit_memory()
        left = memoryview(ENCODER.encode(compiled(job, engines)))
        while left:
            left = left[os.write(pipe, left) :]
        os._exit(0)
    except BaseException:  # whatever a library raises: shown, and told as the end of this child
        traceback.print_exc()
    finally:
        os._exit(1)


def limit_memory() -> None:
    """Allow MEMORY beside what this process has. If the system does not tell that, memory is not bounded."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def compiled(job: Compile, engines: Engines) -> Compiled:
    """The compiled grammar, proved by its first mask; or only the name of an engine that is not made yet."""

    def refused(code: str, cause: str, param: str = "grammar") -> Compiled:
        return Compiled(job.number, 0.0, status=400, code=code, cause=cause, param=param)

    try:
        grammar = prepared(job.grammar)
        name, made = whole(grammar, engines)
        why = unusable(engines, name, made.matcher(), job.vocab_size)
        if why is not None:
            return refused("invalid_grammar", f"no reply can match this {grammar.kind}{why}; correct it")
        packed = made.packed()
    except Unmade as unmade:
        return Compiled(job.number, 0.0, unmade.name)
    except RequestError as error:
        return refused(error.code, error.message, error.param or "grammar")
    except (RecursionError, MemoryError) as error:
        return refused("grammar_too_large", f"the {job.grammar.kind} is too large: {type(error).__name__}; simplify it")
    if len(packed) > MOST_PACKED:
        size = f"{len(packed) >> 20} MiB compiled, and at most {MOST_PACKED >> 20} are taken"
        return refused("grammar_too_large", f"the {job.grammar.kind} has {size}; simplify it")
    return Compiled(job.number, 0.0, name, grammar, packed)


def whole(grammar: Grammar, engines: Engines) -> tuple[str, CompiledGrammar]:
    """As Engines.compile. A refusal names the client's own grammar if that is at fault, or the tool whose parameters
    are."""
    try:
        return engines.compile(grammar)
    except RequestError as error:
        refusal = error
    if grammar.beside is not None:
        try:
            engines.compile(prepared(grammar.beside))
        except RequestError as error:
            raise RequestError(error.message, param="format", code=error.code) from None
    for name, parameters in parameters_in(grammar):
        schema = Grammar("json_schema", msgspec.json.encode(parameters).decode(), strict=grammar.strict)
        try:
            engines.compile(prepared(schema))
        except RequestError as error:
            message = f"the parameters of the tool {name}: {error.message}"
            raise RequestError(message, param=error.param, code=error.code) from None
    raise refusal


def unusable(engines: Engines, name: str, matcher: object, vocab_size: int) -> str | None:
    """The reason why no token can come first; None if one can."""
    masks = np.zeros((1, -(-vocab_size // 32)), np.int32)
    engines.named(name).fill([matcher], masks, [0])
    if error := getattr(matcher, "error", ""):
        return f": {str(error)[:300]}"
    return None if masks.any() else ""


def main(descriptor: int) -> int:
    """The exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    with socket.socket(fileno=descriptor) as sock:
        sock.setblocking(True)
        frames: BlockingFrames[Boot | Compile] = BlockingFrames(sock, receives=Boot | Compile)
        boot = frames.receive()
        if not isinstance(boot, Boot):
            return 0
        set_up_logging(boot.config.process.log_level)
        try:
            Compiler(frames, descriptor, boot.config).run()
        except ConnectionError:  # nobody wants the answer
            return 0
        except EngineError as error:
            with suppress(ConnectionError):
                frames.send(Fatal("grammar compiler", str(error)))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
