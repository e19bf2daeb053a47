"""Sources in C, compiled on first use into a library that ctypes loads.

The library is kept in the user's cache, or in a temporary folder where that cannot be used, under a name that holds
everything it depends on. Without a compiler, one that is in the cache serves. Left out: what a library is for, and what
is done without it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from engine.errors import counted

log = logging.getLogger("engine.kernels")

SILENCE = 0.9  # seconds between two lines of the log while all wait for the compiler


class Sources(Struct, frozen=True):
    """The C files and headers at `paths`, called `name` in files' names and `title` in the log."""

    name: str
    title: str
    paths: tuple[Path, ...]
    flags: tuple[str, ...]
    linked: tuple[str, ...] = ()  # what the linker gets besides
    native: bool = False  # whether the flags say -march=native

    def load(self) -> ctypes.CDLL | None:
        """The library; None where there is neither a compiler nor what one has made before. Raises CalledProcessError
        where the compiler fails, and OSError where no folder can be used."""
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        return self.library(compiler) if compiler else self.compiled_before()

    def library(self, compiler: str) -> ctypes.CDLL:
        """The library out of the user's cache, or where that cannot be used, out of a temporary folder."""
        try:
            return ctypes.CDLL(str(self._build(compiler, _cache())))
        except (OSError, RuntimeError) as error:  # it cannot be written or mapped, or there is no home
            folder = _temporary_folder()
            log.warning("the cache cannot be used (%s); %s are kept in %s", error, self.title, folder)
        return ctypes.CDLL(str(self._build(compiler, folder)))

    def compiled_before(self) -> ctypes.CDLL | None:
        """A library in the user's cache, whatever compiled it: an image may have left its compiler behind."""
        with suppress(RuntimeError):  # there is no home
            for found in sorted(_cache().glob(f"{self._stem()}-*.so")):
                return ctypes.CDLL(str(found))
        return None

    def _build(self, compiler: str, cache: Path) -> Path:
        """The library's path in `cache`; compiled unless it is there. Raises CalledProcessError, and OSError where
        `cache` cannot be used."""
        target = cache / f"{self._stem()}-{_digest(compiler, 8)}.so"
        if target.exists():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder, ThreadPoolExecutor() as pool:
            log.info("compiling %s, once and for some seconds, with %s", self.title, compiler)
            linked = Path(folder, f"{self.name}.so")
            objects = {str(path): str(Path(folder, f"{path.stem}.o")) for path in self.paths if path.suffix == ".c"}
            commands = [(compiler, *self.flags, "-c", source, "-o", compiled) for source, compiled in objects.items()]
            wait_for([pool.submit(_run, command) for command in commands])
            _run((compiler, "-shared", *objects.values(), *self.linked, "-o", str(linked)))
            os.replace(linked, target)  # whole or not at all, whoever else is compiling
        return target

    def _stem(self) -> str:
        """The library's name without its compiler: sources, flags, what is linked, and the processor."""
        machine = processor() if self.native else platform.machine()
        sources = (path.read_text() for path in self.paths)
        return f"{self.name}-" + _digest("\0".join((*sources, *self.flags, *self.linked, machine)), 16)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engine"


def _temporary_folder() -> Path:
    """A folder for this user alone: the same one every time, unless somebody else has put something in its place."""
    folder = Path(tempfile.gettempdir()) / f"engine-kernels-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        found = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="engine-kernels-"))
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if ours else Path(tempfile.mkdtemp(prefix="engine-kernels-"))


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def wait_for(compilations: Sequence["Future[None]"]) -> None:
    """Returns when all have ended, and says meanwhile how many have. Raises what they raise."""
    began, pending = time.monotonic(), set(compilations)
    while pending:
        ended, pending = wait(pending, timeout=SILENCE)
        for each in ended:
            each.result()
        if pending:
            ready, seconds = len(compilations) - len(pending), time.monotonic() - began
            log.info("%d of %s compiled after %.0f s", ready, counted(len(compilations), "file"), seconds)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:  # of the compiler, not of the cache
        raise subprocess.CalledProcessError(127, command, stderr=str(error)) from error


def processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def said(error: OSError | subprocess.CalledProcessError) -> str:
    """What the compiler or the system says of a failure."""
    return str(getattr(error, "stderr", None) or error).strip()
