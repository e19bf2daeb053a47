"""`python -m engine.text.process FD`: renders and tokenizes long prompts, one at a time, for the peer on socket FD.

Templates and the decoding of JSON hold the interpreter's lock, so in a thread they would still hold up the event loop.
The first frame is TextBoot; then every TextWork is answered, in order. Ends when the peer closes. Left out:
deadlines, which are the peer's; it ends this process.
"""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress

import msgspec

from engine.actors.tokenizer import Admission
from engine.errors import EngineError, RequestError
from engine.grammars.engines import grammar_engines
from engine.logs import set_up_logging
from engine.messages import ToTextProcess
from engine.messages.control import Fatal, Retired
from engine.messages.reply import Failed
from engine.messages.text import TextAnswer, TextBoot, TextJob, TextWork
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime.channel import BlockingFrames
from engine.runtime.memory import peak_memory
from engine.text.fallback import text_of
from engine.text.jobs import perform

GROWN = 1 << 30  # bytes above which a process gives up its memory: the system gets it back no other way
UNPACK = msgspec.msgpack.Decoder(TextJob)
READ = msgspec.json.Decoder(TextJob)


def main(descriptor: int) -> None:
    """Until the peer closes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # several of these processes are what is parallel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock, suppress(ConnectionError):
        sock.setblocking(True)
        frames: BlockingFrames[ToTextProcess] = BlockingFrames(sock, receives=ToTextProcess)
        boot = frames.receive()
        if boot is None:
            return
        assert isinstance(boot, TextBoot), f"the first frame is {type(boot).__name__}, not TextBoot"
        set_up_logging("error")  # the front has said what it finds as it loads
        try:
            admission = _load(boot)
        except EngineError as error:
            frames.send(Fatal("text process", str(error)))
            return
        logging.getLogger("engine").setLevel(boot.config.process.log_level.upper())
        while (work := frames.receive()) is not None:
            assert isinstance(work, TextWork), f"a text process that runs got {type(work).__name__}"
            answer = answered(admission, work)
            if grown := peak_memory() > GROWN:
                frames.send(Retired())
            frames.send(answer)
            if grown:
                return


def _load(boot: TextBoot) -> Admission:
    plugins = Plugins.load(boot.config.model.plugins)
    checkpoint = open_checkpoint(plugins, boot.config.model.model)
    text = text_of(plugins, checkpoint, boot.config, boot.template)
    return Admission(text, bool(grammar_engines(plugins)), named=boot.config.cache.cache_events)


def unpacked(work: TextWork) -> TextJob:
    """The job in `work`."""
    job: TextJob = (READ if work.is_json else UNPACK).decode(work.packed)
    return job


def answered(admission: Admission, work: TextWork) -> TextAnswer | Failed:
    """The answer to the job in `work`, or the reason why there is none."""
    try:
        return perform(admission, unpacked(work))
    except RequestError as error:
        return Failed.of("", error)
    except RecursionError:
        return Failed("", 400, "invalid_value", "the request nests too deeply; flatten it")
    except MemoryError:
        said = "the request takes more memory to render and tokenize than there is; send it in parts"
        return Failed("", 413, "out_of_memory", said)


if __name__ == "__main__":
    main(int(sys.argv[1]))
