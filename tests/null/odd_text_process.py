"""A text process that does as it is told: `python odd_text_process.py FD`.

The text of a Tokenize says what: "die", "fatal", "hang", "retire"; whatever else is answered with this process's id."""

import os
import socket
import sys
import time
from array import array

import msgspec

from engine.channel import BlockingFrames
from engine.messages import Fatal, Retired, TextBoot, TextJob, TextWork, Tokenize, Tokenized, ToTextProcess

DECODER = msgspec.json.Decoder(TextJob)


def main(descriptor: int) -> None:
    frames: BlockingFrames[ToTextProcess] = BlockingFrames(socket.socket(fileno=descriptor), receives=ToTextProcess)
    assert isinstance(frames.receive(), TextBoot)
    while isinstance(work := frames.receive(), TextWork):
        job = DECODER.decode(work.json)
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
