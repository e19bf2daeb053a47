"""The table in C against the one in Python, which test_route_index.py holds against a plain model."""

import random
import secrets
import subprocess
import sys
from array import array
from collections.abc import Callable

import pytest

from engine.router import compiled_table
from engine.router.compiled_table import SOURCES, CompiledTable, compiled, table
from engine.router.table import MARKS, SLOTS, Table, bit_of

needs_compiler = pytest.mark.skipif(compiled() is None, reason="there is no C compiler")
SLOT_COUNT = SLOTS + 3  # so that marks take two words


class Pair:
    """Both tables, told the same, and what they must agree on."""

    def __init__(self) -> None:
        self.python, self.c = Table(), CompiledTable(compiled() or {})

    def both(self, ask: Callable[[Table | CompiledTable], object]) -> object:
        said = ask(self.python)
        assert ask(self.c) == said
        return said

    def tidied(self) -> None:
        for each in (self.python, self.c):
            while each.tidy(100):
                pass

    def check(self) -> None:
        self.both(lambda each: each.check_integrity())


@needs_compiler
@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "all keys want the first place"])
def test_both_tables_say_the_same(monkeypatch: pytest.MonkeyPatch, crowded: bool) -> None:
    if crowded:
        monkeypatch.setattr(secrets, "randbits", lambda _: 0)
    rng, pair = random.Random(0), Pair()
    paths = [list(range(start, start + 40)) for start in range(1, 600, 20)]  # their blocks are in two each
    if not crowded:
        paths = [[rng.getrandbits(64) for _ in range(rng.randint(1, 60))] for _ in range(150)]
        paths += [path[: rng.randint(1, len(path))] + [rng.getrandbits(64) for _ in range(20)] for path in paths]
    bits = {bit_of(slot, mark) for slot in range(SLOT_COUNT) for mark in range(MARKS)}
    used = set[int]()
    for turn in range(2500):
        for bit in (bits if turn % 250 == 0 else set()) - used:
            assert not pair.both(lambda each, b=bit: each.retired(b))
            pair.both(lambda each, b=bit: each.use(b))
            used.add(bit)
        path, bit = array("Q", rng.choice(paths)), rng.choice(sorted(used))
        start, most = rng.randint(0, len(path)), rng.choice((5, 1000))
        match rng.randint(0, 5):
            case 0 | 1:
                pair.both(lambda each, a=(path, start, bit, most): each.mark(*a))
            case 2:
                pair.both(lambda each, p=path, b=bit, t=turn: each.unmark(p, b, trailing=t % 2 == 0))
            case 3:
                pair.both(lambda each, p=path, b=bit: (each.leading(p, b), each.lengths(p)))
            case 4:
                for each in (pair.python, pair.c):
                    each.tidy(rng.randint(1, 300))
            case 5 if turn % 20 == 0:
                used.discard(bit)
                pair.both(lambda each, b=bit: each.retire(b, somewhere=True))
        if turn % 250 == 249:
            pair.tidied()
            pair.check()
            assert len(pair.c) > 100


@needs_compiler
def test_a_table_grows_while_a_walk_is_under_way_and_shrinks_after_it() -> None:
    rng, each = random.Random(0), CompiledTable(compiled() or {})
    old, new = ([rng.getrandbits(64) for _ in range(5000)] for _ in range(2))
    first, second = bit_of(0, 0), bit_of(0, 1)
    for bit in (first, second):
        each.use(bit)
    assert each.mark(old, 0, first, 1 << 40) == 5000
    each.retire(first, somewhere=True)
    assert each.tidy(1000)  # some rows are walked over, and then all of them move
    assert each.mark(new, 0, second, 1 << 40) == 5000
    each.use(bit_of(30, 0))  # and once more, to have a second word
    while each.tidy(1000):
        pass
    assert len(each) == 5000
    assert each.check_integrity() == {second: 5000, bit_of(30, 0): 0}
    assert each.lengths(new) == {0: 5000}
    each.retire(second, somewhere=True)
    while each.tidy(1000):
        pass
    assert len(each) == 0


@needs_compiler
def test_a_table_that_is_dropped_gives_its_memory_back() -> None:
    program = (
        "import resource\nfrom engine.router.compiled_table import compiled, CompiledTable\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "def fill():\n    one = CompiledTable(compiled())\n    one.use(0)\n"
        "    one.mark(range(100_000), 0, 0, 1 << 40)\n"
        "fill()\nbefore = peak()\nfor _ in range(20): fill()\nprint(peak() - before)\n"
        "import sys\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 1024  # KiB: twenty tables of 3 MiB were made


def test_without_a_compiler_the_table_is_in_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compiled_table, "compiled", compiled.__wrapped__)
    monkeypatch.setenv("ENGINE_CPU_KERNELS", "0")
    assert isinstance(table(), Table) and not caplog.text
    monkeypatch.delenv("ENGINE_CPU_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert isinstance(table(), Table) and "there is no C compiler" in caplog.text
    monkeypatch.setenv("CC", "/bin/false")
    assert isinstance(table(), Table)
    assert SOURCES.compiled_before() is None
