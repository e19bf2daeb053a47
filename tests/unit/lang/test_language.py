"""Programs on the echo model, which counts on from the prompt's last byte: sync, async, forks, errors, ends."""

import asyncio
import inspect
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import served

from engine import AsyncEngine, ConfigError, Engine, RequestError, SamplingParams
from engine.errors import ProgramError
from engine.lang import (
    Server,
    State,
    assistant,
    decide,
    function,
    gen,
    gen_int,
    gen_string,
    select,
    separate_reasoning,
    system,
    unconditional_likelihood_normalized,
    user,
)
from engine.lang.transcript import Prompt
from engine.lang.turns import Turn, Turns

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="echo", log_level="error") as engine:
        yield engine


# ── what a program says ──────────────────────────────────────────────────────────────────────


@function
def letters(s: State, first: str) -> None:
    s += first + gen("two", max_tokens=2) + "x"
    s += gen("three", max_tokens=3)


@function
async def letters_async(s: State, first: str) -> None:
    s += first + gen("two", max_tokens=2) + "x"
    assert await s.get("two") == "bc"
    s += gen("three", max_tokens=3)
    await s.synced()
    assert s.text() == "abcxyz{"


def test_text_and_variables(engine: Engine) -> None:
    for program in (letters, letters_async):
        s = program.bind(first="a").run(backend=engine, **GREEDY)
        assert (s.text(), s["two"], s.get_var("three")) == ("abcxyz{", "bc", "yz{")
        assert ("two" in s, "four" in s, s.messages(), s.error()) == (True, False, [], None)
        meta = s.get_meta_info("three")
        assert (meta.finish, meta.prompt_tokens, meta.completion_tokens) == ("length", 4, 3)
        assert (s.usage.calls, s.usage.prompt_tokens, s.usage.completion_tokens) == (2, 1 + 4, 2 + 3)


def test_sampling_fields_of_the_run_are_defaults(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("own", max_tokens=1) + gen("runs") + gen("stopped", stop="h")

    s = program.run(backend=engine, max_tokens=4, **GREEDY)
    assert [s[name] for name in ("own", "runs", "stopped")] == ["b", "cdef", "g"]


def test_several_replies_and_the_first_goes_on(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("b", max_tokens=2, n=3) + gen("c", max_tokens=1)

    s = program.run(backend=engine, **GREEDY)
    assert (s["b"], s["c"], s.text()) == (["bc"] * 3, "d", "abcd")
    meta = s.get_meta_info("b")
    assert meta.completion_tokens == 6


def test_roles_are_written_by_the_models_template(engine: Engine) -> None:
    """The echo model's template writes contents, one a line: after the newline comes a byte 11, then 12."""

    @function
    def program(s: State) -> None:
        s += system("S") + user(["a", "b"])
        with s.assistant():
            s += gen("first", max_tokens=1)
        s.user("more")
        s += assistant("so " + gen("second", max_tokens=2))

    s = program.run(backend=engine, **GREEDY)
    assert (s["first"], s["second"]) == ("\x0b", '!"')
    assert s.messages() == [
        {"role": "system", "content": "S"}, {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "\x0b"}, {"role": "user", "content": "more"},
        {"role": "assistant", "content": 'so !"'},
    ]  # fmt: skip


def test_select_takes_what_the_model_says_next(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "a" + select("one", ["x", "bc", "bd"])
        s += gen("two", choices=["e", "d"], choices_method=unconditional_likelihood_normalized)

    s = program.run(backend=engine)
    assert (s["one"], s["two"], s.text()) == ("bc", "d", "abcd")
    meta = s.get_meta_info("one")
    assert [each.ids for each in meta.scores] == [[120], [98, 99], [98, 100]]
    assert [round(each.mean) for each in meta.scores] == [-200, 0, -100]


def test_typed_values_and_grammars(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "0" + gen_int("whole", max_tokens=3) + "!" + gen_string("string", max_tokens=4) + "T"
        s += gen("switch", dtype=bool) + gen("json", json_schema={"const": 1}, max_tokens=4) + "1"
        s += gen("regex", regex="[4-9]{2}")

    s = program.run(backend=engine, **GREEDY)
    assert [s[name] for name in ("whole", "json")] == ["123", "1"]
    assert s["string"].startswith('"') and s["switch"] in ("True", "False") and len(s["regex"]) == 2


def test_scopes_and_variables_of_the_programs_own(engine: Engine) -> None:
    @function
    def inner(s: State, text: str) -> int:
        s += text + gen("in", max_tokens=1)
        return 7

    @function
    def program(s: State) -> None:
        s.set_var("own", 3)
        with s.var_scope("scope"):
            assert inner(s, text="k") == 7
        s += "." + s["scope"]

    s = program.run(backend=engine, **GREEDY)
    assert (s["own"], s["scope"], s["in"], s.text()) == (3, "kl", "l", "kl.kl")


def test_a_scope_in_which_a_step_fails_has_no_text(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        with s.var_scope("scope"):
            s += "k" + gen("in", max_tokens=1) + user("no role may come here")

    s = program.run(backend=engine, **GREEDY)
    assert s["in"] == "l"
    with pytest.raises(ProgramError, match="comes behind text outside of any role"):
        s["scope"]


def test_a_scope_that_is_left_by_an_exception_lets_nobody_wait(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        with suppress(ZeroDivisionError), s.var_scope("scope"):
            s += str(1 // 0)
        with pytest.raises(ProgramError, match="division or modulo by zero"):
            s["scope"]
        s.set_var("after", 1)

    assert program.run(backend=engine, timeout=5)["after"] == 1


# ── forks ────────────────────────────────────────────────────────────────────────────────────


def test_forks_go_on_alone_and_come_back_as_lists(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("before", max_tokens=1)
        forks = s.fork(3)
        forks += lambda index: "xyz"[index]
        forks += gen("after", max_tokens=1)
        forks += ["1", "2", "3"]
        assert [fork["before"] for fork in forks] == ["b"] * 3
        assert forks[1].text() == "abyz2"
        forks.join()
        s += "-" + s["after"][2]
        with s.copy() as copy:
            copy += gen("lost", max_tokens=1)
            assert copy["lost"] == "|"
        forks.join("concate_and_append")

    s = program.run(backend=engine, **GREEDY)
    assert (s["after"], s["before"], "lost" in s) == (["y", "z", "{"], "b", False)
    assert s.text() == "ab-{xy1yz2z{3"


def test_forks_run_at_once(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        forks = s.fork(4)
        forks += "a"
        forks += gen("long", max_tokens=40)

    before = engine.stats().steps
    program.run(backend=engine, **GREEDY)
    again = program.run(backend=engine, **GREEDY)
    assert again.usage.completion_tokens == 160
    assert engine.stats().steps - before < 200, "one after another they take 320 steps"


Branch = tuple[Any, ...]
PIECES = st.one_of(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 3))
TREES: Any = st.recursive(
    st.lists(PIECES, min_size=1, max_size=4).map(tuple),
    lambda inner: st.tuples(st.lists(PIECES, max_size=3).map(tuple), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=5,
)


def appended(s: State, tree: Any) -> list[State]:
    """Appends a tree of texts, lengths of replies, and forks; its leaves."""
    pieces, forks = tree if len(tree) == 2 and isinstance(tree[1], list) else (tree, [])
    for piece in pieces:
        s += piece if isinstance(piece, str) else gen(max_tokens=piece)
    if not forks:
        return [s]
    return [leaf for fork, inner in zip(s.fork(len(forks)), forks, strict=True) for leaf in appended(fork, inner)]


def one_by_one(engine: Engine, tree: Any, text: str) -> list[str]:
    """The same, a call after another."""
    pieces, forks = tree if len(tree) == 2 and isinstance(tree[1], list) else (tree, [])
    for piece in pieces:
        params = SamplingParams(temperature=0, max_tokens=piece if isinstance(piece, int) else 1)
        text += piece if isinstance(piece, str) else engine.generate(text, params).text
    return [leaf for inner in forks for leaf in one_by_one(engine, inner, text)] if forks else [text]


@settings(max_examples=25)
@given(tree=TREES)
def test_the_text_is_that_of_the_calls_one_by_one(engine: Engine, tree: Any) -> None:
    leaves: list[State] = []

    @function
    def program(s: State) -> None:
        s += "a"
        leaves.extend(appended(s, tree))

    program.run(backend=engine, **GREEDY)
    assert [leaf.text() for leaf in leaves] == one_by_one(engine, tree, "a")


# ── our server ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with served(engine) as server:
        yield server


@function
def plain(s: State) -> None:
    s += "a" + gen("two", max_tokens=2, top_k=3) + gen("stop", stop=["g"]) + gen("regex", regex="[4-9]{2}")
    s += "a" * 40 + select("one", ["x", "bc", "bd"])
    s += gen("alone", choices=["e", "d"], choices_method=unconditional_likelihood_normalized)
    s += gen("many", n=2, max_tokens=1) + gen("json", json_schema={"const": 1})


@function
def chat(s: State) -> None:
    s += user("Hello") + assistant(gen("first", max_tokens=2)) + user("more")
    s += assistant("so " + gen("second", max_tokens=2) + select("third", ["#", "$"]))


@pytest.mark.parametrize("program", [plain, chat])
def test_our_server_gives_what_the_engine_gives(engine: Engine, server: Server, program: Any) -> None:
    local, remote = (program.run(backend=backend, **GREEDY) for backend in (engine, server))
    assert (remote.text(), remote.messages()) == (local.text(), local.messages())
    names = [name for name in ("two", "stop", "regex", "one", "alone", "many", "json", "third") if name in local]
    assert [remote[name] for name in names] == [local[name] for name in names]
    for name in names:
        ours, theirs = local.get_meta_info(name), remote.get_meta_info(name)
        assert (theirs.prompt_tokens, theirs.completion_tokens) == (ours.prompt_tokens, ours.completion_tokens)
        assert theirs.scores == ours.scores
    assert remote.usage.calls == local.usage.calls


def test_a_select_scores_its_choices_over_one_cached_prefix(engine: Engine, server: Server) -> None:
    @function
    def program(s: State, first: str) -> None:
        s += first * 64 + select("one", ["x", "yz", "z"])

    for backend, first in ((engine, "k"), (server, "l")):
        meta = program.run(first, backend=backend).get_meta_info("one")
        assert (meta.prompt_tokens, meta.cached_tokens) == (3 * 64 + 4, 2 * 48), (
            "whole pages, up to the token before the choice"
        )


def test_eight_forks_compute_their_prefix_once(engine: Engine, server: Server) -> None:
    @function
    def program(s: State, first: str) -> None:
        s += first * 100
        forks = s.fork(8)
        forks += str
        forks += gen("reply", max_tokens=2)

    for backend, first in ((engine, "m"), (server, "n")):
        usage = program.run(first, backend=backend, **GREEDY).usage
        assert (usage.calls, usage.prompt_tokens) == (8, 8 * 101)
        assert usage.prompt_tokens - usage.cached_tokens == 101 + 7 * 5, "the others begin in its last page"


# ── streams and batches ──────────────────────────────────────────────────────────────────────


def test_a_stream(engine: Engine) -> None:
    with letters.stream("a", backend=engine, **GREEDY) as s:
        assert "".join(s.text_iter("three")) == "yz{"
        pieces = list(s.text_iter())
    assert "".join(pieces) == "abcxyz{" and len(pieces) >= 4
    with letters.stream("a", backend=engine, **GREEDY) as s, pytest.raises(KeyError, match=r"'four'.*two, three"):
        list(s.text_iter("four"))


def test_a_batch_keeps_order_and_failures(engine: Engine) -> None:
    @function
    def program(s: State, text: str, shared: str) -> None:
        s += shared + text + gen("next", max_tokens=1)
        if text == "q":
            raise ValueError("no q")
        s += s["next"]

    batch = [{"text": text, "shared": "ab"[index % 2]} for index, text in enumerate("xyqza")]
    states = program.run_batch(batch, backend=engine, concurrency=2, progress=True, **GREEDY)
    assert [s.text()[1:] for s in states if s.error() is None] == ["xyy", "yzz", "z{{", "abb"]
    with pytest.raises(ValueError, match="no q"):
        states[2].text()
    with pytest.raises(ConfigError, match="concurrency is 0"):
        program.run_batch(batch, backend=engine, concurrency=0)
    with pytest.raises(ConfigError, match="no argument 'txt'"):
        program.run_batch([{"txt": "a"}], backend=engine)


def test_a_batch_begins_with_what_is_shared(engine: Engine) -> None:
    begun: list[str] = []

    @function
    async def program(s: State, question: str, document: str) -> None:
        begun.append(document + question)

    batch = [{"question": str(index), "document": "ab"[index % 2]} for index in range(6)]
    program.run_batch(batch, backend=engine, concurrency=1)
    assert begun == ["a0", "a2", "a4", "b1", "b3", "b5"]


# ── errors ───────────────────────────────────────────────────────────────────────────────────


def test_an_error_is_raised_where_the_value_is_read_with_the_programs_line(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("good", max_tokens=1)
        s += gen("long", max_tokens=100_000)
        s += "more" + gen("behind")

    (_, at) = inspect.getsourcelines(program.__wrapped__)
    s = program.run(backend=engine, **GREEDY)
    assert s["good"] == "b"
    for read in (lambda: s["long"], lambda: s["behind"], s.text, s.sync, lambda: s.get_meta_info("long")):
        with pytest.raises(ProgramError, match=rf"test_language.py:{at + 3}: .*max_tokens is 100000") as caught:
            read()
        assert isinstance(caught.value.__cause__, RequestError)
    assert s.error() is caught.value


@pytest.mark.parametrize(
    ("append", "says"),
    [
        (lambda s: s.append(user(gen("x"))), "message of the user"),
        (lambda s: s.append(user("a") + gen("x")), "outside of any role"),
        (lambda s: s.append(user("a") + "b" + gen("x")), "the text 'b' stands outside"),
        (lambda s: s.append("a" + user("b") + gen("x")), "behind text outside of any role"),
        (lambda s: s.append(user(system("b")) + gen("x")), "begins inside one of the user"),
        (lambda s: s.append(separate_reasoning("a" + gen("x"))), "needs roles"),
        (lambda s: s.append("a" + select("x", ["b"]) + gen("x", regex="(")), "regex"),
    ],
)
def test_what_no_program_can_say(engine: Engine, append: Any, says: str) -> None:
    @function
    def program(s: State) -> None:
        append(s)

    with pytest.raises(ProgramError, match=says):
        program.run(backend=engine, **GREEDY)["x"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gen("x", temprature=1), "no field 'temprature'.*temperature"),
        (lambda: gen("x", temperature=3), "temperature"),
        (lambda: gen("x", n=0), "n is 0"),
        (lambda: gen("x", dtype=list), "dtype is"),
        (lambda: gen("x", choices=["a"], top_p=0.5), "leave out top_p"),
        (lambda: select("x", []), "choices is"),
        (lambda: select("x", ["a", ""]), "choices is"),
        (lambda: select("x", ["a"], temperature=1), "temperature is 1"),
        (lambda: function(lambda state: None), "first argument"),
        (lambda: letters.run("a", backend=3), "backend is 3"),
        (lambda: letters.run("a", backend=AsyncEngine(model="echo")), "await run_async"),
    ],
)
def test_what_is_refused_at_once(make: Any, says: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=says):
        make()


def test_arguments_are_checked(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"no argument 'frist'.*first"):
        letters.run(frist="a", backend=engine)
    with pytest.raises(ConfigError, match="the program has no backend"):
        letters("a")
    with pytest.raises(TypeError, match="not <object"):
        function(lambda s: s.append(object())).run(backend=engine)


def test_nobody_waits_in_an_event_loop(engine: Engine) -> None:
    @function
    async def program(s: State) -> None:
        s += "a" + gen("b", max_tokens=2)
        for wait in (lambda: s["b"], s.text, lambda: s.get_meta_info("b"), lambda: next(s.text_iter())):
            with pytest.raises(RuntimeError, match=r"await|async"):
                wait()
        assert await s.get("b") == s["b"] == "bc"

    ended = program.run(backend=engine, **GREEDY)
    with pytest.raises(ProgramError, match="the run has ended"):
        ended += "more"


# ── ends ─────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_ends_calls_and_tells_readers(engine: Engine) -> None:
    states: list[State] = []

    @function
    def program(s: State) -> None:
        states.append(s)
        s += "a" + gen("short", max_tokens=1) + gen("long", max_tokens=4000)
        s["long"]

    with pytest.raises(ProgramError, match=r"timeout of 0.2 s"):
        program.run(backend=engine, timeout=0.2, **GREEDY)
    assert states[0]["short"] == "b"
    with pytest.raises(ProgramError, match="'long' did not come: the program took longer"):
        states[0]["long"]
    with pytest.raises(ProgramError, match="took longer"):
        states[0].text()
    assert engine.inner.front.open == 0


def test_cancelled_forks_leave_nothing_open(engine: Engine) -> None:
    engine.portal.call(cancel_forks, engine.inner)


async def cancel_forks(here: AsyncEngine) -> None:
    states: list[State] = []

    @function
    async def program(s: State) -> None:
        s += "a" + gen("first", max_tokens=2)
        forks = s.fork(5)
        forks += gen("long", max_tokens=3000, n=2)
        forks.join()
        states.append(s)
        await s.get("long")

    for tick in range(12):
        task = asyncio.create_task(program.run_async(backend=here, **GREEDY))
        while not here.front.open and tick:
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(0.002 * tick)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert here.front.open == 0
    assert len(states) > 6
    with pytest.raises(ProgramError, match="the run was cancelled"):
        states[-1]["long"]
    with anyio.fail_after(60):
        while here.front.stats.running or here.front.stats.waiting:
            await anyio.sleep(0.01)
    flushed = await here.front.flush()
    assert flushed.in_use == 0


def test_streams_and_readers_that_leave(engine: Engine) -> None:
    engine.portal.call(stream_and_leave, engine.inner)


async def stream_and_leave(here: AsyncEngine) -> None:
    async with letters_async.stream_async("a", backend=here, **GREEDY) as s:
        assert "".join([piece async for piece in s.text_async_iter()]) == "abcxyz{"

    @function
    async def program(s: State) -> None:
        s += "a" + gen("b", max_tokens=500)
        with anyio.move_on_after(0.001):
            await s.get("b")
        assert len(await s.get("b")) > 400, "who leaves does not take the value along"

    await program.run_async(backend=here, ignore_eos=True, **GREEDY)
    async with program.stream_async(backend=here, **GREEDY) as s:
        async for _ in s.text_async_iter("b"):
            break
    assert here.front.open == 0


# ── decisions ────────────────────────────────────────────────────────────────────────────────


def test_decisions_are_asked_beside_the_program_and_leave_nothing_in_its_text() -> None:
    @function
    def program(s: State) -> None:
        s += "abc" + decide("statement", "It is so.") + gen("a", max_tokens=2)
        s += decide("choice", "Which?", choices={"x": "the first", True: ""}) + decide("level", "?", levels=["l", "h"])
        assert s["statement"].answer in (True, False)

    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with Engine(model="echo", log_level="error", chat_template=plain) as templated, served(templated) as server:
        found = [program.run(backend=backend, **GREEDY) for backend in (templated, server)]
    for s in found:
        assert s.text() == "abcde" and s.usage.calls == 4
        for name, values in (("statement", [True, False]), ("choice", ["x", True]), ("level", ["l", "h"])):
            shares = s[name].probabilities
            assert list(shares) == values and sum(shares.values()) == pytest.approx(1)
            assert s[name].confidence == max(shares.values()) == shares[s[name].answer]
        assert s["level"].score == pytest.approx(s["level"].probabilities["h"]) and s["choice"].score is None
        assert s["level"].probabilities == pytest.approx(found[0]["level"].probabilities)


def test_decisions_of_too_few_options_or_of_two_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="not both"):
        decide("a", "?", choices=["x", "y"], levels=["x", "y"])
    with pytest.raises(RequestError, match="has 1 options"):
        decide("a", "?", choices=["x"])


# ── the order of a batch ─────────────────────────────────────────────────────────────────────


def test_programs_of_a_batch_run_in_the_order_of_their_first_prompts(engine: Engine) -> None:
    running: set[int] = set()
    most, order = [0], []

    def stem(number: int) -> str:  # of which the arguments say nothing
        return "ba"[number % 2]

    @function
    async def program(s: State, number: int) -> None:
        s += stem(number) * 20 + str(number) + gen("first", max_tokens=1)
        await s.get("first")
        running.add(number)
        most[0] = max(most[0], len(running))
        order.append(stem(number))
        s += gen("second", max_tokens=1)
        await s.get("second")
        running.remove(number)

    batch = [{"number": number} for number in range(40)]
    states = program.run_batch(batch, backend=engine, concurrency=4, timeout=60, **GREEDY)
    assert [s.text()[:20] for s in states] == [stem(number) * 20 for number in range(40)]
    assert most[0] <= 4 and len(order) == 40
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes <= 10, "at random there are 20; programs of one step, and those begun later, may pass others"


def test_a_program_that_fails_or_calls_nothing_gives_its_turn_to_others(engine: Engine) -> None:
    @function
    def program(s: State, number: int) -> None:
        if number % 3 == 0:
            raise ValueError(number)
        s += f"a{number}"
        if number % 3 == 1:
            s += gen("x", max_tokens=1, stop=None if number % 2 else "")

    states = program.run_batch([{"number": number} for number in range(24)], backend=engine, concurrency=2, **GREEDY)
    assert len(states) == 24 and sum(s.error() is None for s in states) >= 8


@pytest.mark.anyio
async def test_a_turn_tells_who_waits_for_it_and_that_it_has_come() -> None:
    turns, told = Turns(1, 3), []
    first, second, never = (turns.begin() for _ in range(3))

    async def come(name: str, turn: Turn, text: str) -> None:
        await turn.come(Prompt(text), lambda waiting: told.append((name, waiting)))

    async with anyio.create_task_group() as group:
        group.start_soon(come, "second", second, "b")
        group.start_soon(come, "first", first, "a")
        await anyio.wait_all_tasks_blocked()
        assert told == [("second", True), ("first", True)]
        while ("first", False) not in told:
            await anyio.sleep(0.001)
        assert ("second", False) not in told
        await come("first", first, "a later call")  # does not wait
        never.end()
        first.end()
    assert told[2:] == [("first", False), ("second", False)]


@pytest.mark.anyio
async def test_nobody_is_waited_for_once_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.lang.turns.GRACE", 3600.0)
    turns, told = Turns(2, 2), []

    async def come(text: str) -> None:
        await turns.begin().come(Prompt(text), lambda waiting: told.append((text, waiting)))

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(come, "b")
            group.start_soon(come, "a")
    assert told == [("b", True), ("a", True), ("a", False), ("b", False)]
