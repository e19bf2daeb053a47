"""How two hosts prove to each other that they hold the same secret, which never travels.

    host 0 ──── greeting, nonce of 0 ─────────────────────────────────> host n
           <─── greeting, nonce of n, HMAC(secret, "join", both nonces)
           ──── yes, HMAC(secret, "host", both nonces); or no, and the end ──>

Who joins proves first, so a stranger who connects learns nothing. What follows is neither encrypted nor signed: the
network between hosts must be private. All messages are of a fixed length, read before anything is allocated for them.
"""

import hmac
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from engine.errors import ConfigError, EngineError, counted

VARIABLE = "ENGINE_TOKEN"
LEAST = 16  # characters of a token, which whoever sees a proof may try to guess
GREETING = b"engine-1"
NONCE = PROOF = 32  # bytes
YES, NO = b"+", b"-"
SECONDS = 10.0  # that a peer may take


class NotTrusted(EngineError):
    """The peer has another token, or is no engine."""


def read_token(path: str | None, environ: Mapping[str, str] = os.environ) -> bytes:
    """The secret. Raises ConfigError where there is none, or a short one."""
    if path is None and VARIABLE not in environ:
        raise ConfigError(f"several hosts need a secret that all of them have: say --token-file, or set {VARIABLE}")
    try:
        token = environ[VARIABLE] if path is None else Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} cannot be read: {error}") from None
    token = token.strip()
    if len(token) < LEAST:
        raise ConfigError(
            f"the token has {counted(len(token), 'character')} and needs {LEAST}: make one with `openssl rand -hex 32`"
        )
    return token.encode()


def proof(token: bytes, who: bytes, ours: bytes, theirs: bytes) -> bytes:
    """That `who`, b"join" or b"host", has `token`; the nonces are host 0's and the other's."""
    return hmac.digest(token, who + ours + theirs, "sha256")


async def admit(stream: ByteStream, token: bytes) -> bool:
    """Host 0's part, for one who has connected: whether it has the token, which it is told."""
    nonce = secrets.token_bytes(NONCE)
    await stream.send(GREETING + nonce)
    said = await _exactly(stream, len(GREETING) + NONCE + PROOF)
    theirs, shown = said[len(GREETING) : -PROOF], said[-PROOF:]
    if not said.startswith(GREETING) or not hmac.compare_digest(shown, proof(token, b"join", nonce, theirs)):
        await stream.send(NO)
        return False
    await stream.send(YES + proof(token, b"host", nonce, theirs))
    return True


async def _exactly(stream: ByteStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            data += await stream.receive(count - len(data))
        except anyio.EndOfStream:
            raise anyio.BrokenResourceError from None
    return data


def enter(sock: socket.socket, token: bytes, where: str) -> None:
    """The part of who joins host 0, which is at `where`. Raises NotTrusted if the tokens differ, OSError for a
    connection that fails."""
    sock.settimeout(SECONDS)
    said = _read(sock, len(GREETING) + NONCE)
    if not said.startswith(GREETING):
        raise NotTrusted(f"what answers at {where} is not an engine of this version")
    nonce, theirs = secrets.token_bytes(NONCE), said[len(GREETING) :]
    sock.sendall(GREETING + nonce + proof(token, b"join", theirs, nonce))
    if _read(sock, 1) != YES:
        raise NotTrusted(f"the engine at {where} has another token; give all hosts the same")
    if not hmac.compare_digest(_read(sock, PROOF), proof(token, b"host", theirs, nonce)):
        raise NotTrusted(f"what answers at {where} does not have our token")
    sock.settimeout(None)


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise ConnectionError("the peer has closed the connection")
        data += got
    return data
