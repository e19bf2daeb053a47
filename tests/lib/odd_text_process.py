"""A text process that does as it is told: `python odd_text_process.py FD`.

The text of a Tokenize says what: "die", "fatal", "hang", "retire"; whatever else is answered with this process's id."""

import os
import socket
import sys
import time
from array import array

from engine.messages import ToTextProcess
from engine.messages.control import Fatal, Retired
from engine.messages.text import TextBoot, TextWork, Tokenize, Tokenized
from engine.runtime.channel import BlockingFrames
from engine.text.process import unpacked


def main(descriptor: int) -> None:
    frames: BlockingFrames[ToTextProcess] = BlockingFrames(socket.socket(fileno=descriptor), receives=ToTextProcess)
    assert isinstance(frames.receive(), TextBoot)
    while isinstance(work := frames.receive(), TextWork):
        job = unpacked(work)
        assert isinstance(job, Tokenize) and job.text
        match job.text.split()[0]:
            case "die":
                os._exit(3)
            case "fatal":
                frames.send(Fatal("text process", "it was told so"))
                return
            case "hang":
                time.sleep(60)
            case "retire":
                frames.send(Retired())
        frames.send(Tokenized(array("i", [os.getpid()]).tobytes()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
