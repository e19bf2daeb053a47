"""Rows that follow a grammar, in a runner of the echo model: after byte b it wants b + 1, and of what else it may say
it takes the lowest byte. So a regex of digits gives 0, 1, 2 and so on, and where nothing may follow, the end."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import msgspec
import numpy as np
import pytest
import torch

from engine.grammars.engines import Engines, grammar_engines
from engine.kernels.logits.host import HostLogitOps
from engine.layers.attention import AttentionBackend
from engine.layers.build import Build
from engine.messages.assets import Bound, Load, Loaded
from engine.messages.grammars import GRAMMAR, PackedGrammar
from engine.messages.step import SlotAdmit, StepDone
from engine.params.grammar import Grammar
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.plugin.specs import Vocabulary
from engine.testing.steps import step_plan
from engine.worker.memory import allocate
from engine.worker.runner import Runner
from engine.worker.sampling.grammars import NO_TOKEN, Grammars, Guide, Guided
from engine.worker.sampling.mask_table import FIXED
from engine.worker.steps.results import Step
from engine_plugins.checkpoints.echo import END
from engine_plugins.grammars.llguidance.engine import MOST_ITEMS
from engine_plugins.models.echo import Echo

CPU = torch.device("cpu")
SLOTS, PAGE = 4, 4
WORDS = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], frozenset({END}), (END,))
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0)


def no_attention(*_: Any) -> AttentionBackend:
    raise AssertionError("the echo model does not attend")


@pytest.fixture
def grammars() -> Grammars:
    entries = grammar_engines(Plugins.load(("llguidance",)))
    engines = Engines(entries, WORDS, threads=2, whitespace=True)
    return Grammars(engines, ThreadPoolExecutor(1), WORDS, slots=SLOTS, device=CPU, kernels=HostLogitOps())


class Device:
    """A runner, driven as the worker drives it: `step` launches, and finishes what came before only when asked to."""

    def __init__(self, grammars: Grammars) -> None:
        build = Build(dtype=torch.float32, device=CPU, page_size=PAGE, max_model_len=64, attention_backend=no_attention)
        model = Echo({}, build)
        caches = allocate(model.kv_spec(), SLOTS * 16, CPU)
        size = {"slots": SLOTS, "max_model_len": 64, "page_size": PAGE}
        self.runner = Runner(model, caches, CPU, grammars=grammars, **size)
        self.grammars = grammars
        self.in_flight: list[Step] = []
        self.done: list[StepDone] = []
        self.caught_up = 0
        self.steps = 0

    def load(self, number: int, source: str, kind: Any = "regex") -> Loaded:
        told: list[Loaded] = []
        payload = msgspec.msgpack.encode(PackedGrammar("llguidance", Grammar(kind, source), b""))
        self.grammars.load(Load(GRAMMAR, number, payload), told.append)
        self.grammars._thread.submit(lambda: None).result()
        return told[0]

    def step(self, rows: list[tuple[int, ...]], *admits: SlotAdmit) -> None:
        pages = [(admit.slot, index, admit.slot * 16 + index) for admit in admits for index in range(16)]
        self.steps += 1
        self.in_flight.append(self.runner.launch(step_plan(self.steps, rows, admits, pages), self.catch_up))

    def catch_up(self) -> None:
        self.caught_up += 1
        self.finish()

    def finish(self) -> list[StepDone]:
        while self.in_flight:
            self.done.append(self.runner.finish(self.in_flight.pop(0)))
        return self.done

    def said(self, row: int = 0) -> list[int]:
        """The tokens of a sampled row in each step so far that has it."""
        said = []
        for done in self.finish():
            counts, tokens = np.frombuffer(done.counts, "<i4"), np.frombuffer(done.tokens, "<i4")
            if row < len(counts) and counts[row]:
                said.append(int(tokens[counts[:row].sum()]))
        return said


@pytest.fixture
def device(grammars: Grammars) -> Device:
    return Device(grammars)


def admit(slot: int, text: str, grammar: int = 1, reply: bytes = b"", after: str = "", **sampling: Any) -> SlotAdmit:
    ids = np.array(list(text.encode() + reply), "<i4").tobytes()
    asked = msgspec.structs.replace(GREEDY, **sampling)
    bound = (Bound(GRAMMAR, grammar, after.encode()),) if grammar else ()
    return SlotAdmit(slot, ids, asked, len(text), bound=bound)


def guide_of(grammars: Grammars, admitted: SlotAdmit) -> Guide:
    return grammars._guide(admitted, *admitted.bound)


def decode(device: Device, slot: int, at: int, count: int) -> None:
    for place in range(at, at + count):
        device.step([(slot, place, 1, 1)])


def test_a_reply_follows_its_grammar_and_ends_where_it_must(device: Device) -> None:
    assert device.load(1, "[0-9]{3}") == Loaded(GRAMMAR, 1)
    device.step([(0, 0, 2, 1)], admit(0, "ab"))
    decode(device, 0, 2, 3)
    assert device.said() == [*b"012", END]


def test_steps_are_launched_before_the_tokens_before_them_are_known(device: Device) -> None:
    """What the scheduler does: step n + 1 is launched before anybody has looked at n."""
    device.load(1, "[0-9]{2,4}")
    device.step([(0, 0, 2, 1)], admit(0, "ab"))
    decode(device, 0, 2, 6)
    assert device.caught_up == 7 and len(device.in_flight) == 1
    assert device.said() == [*b"0123", END, END, END]  # after its end there is nothing but ends


def test_lines_for_a_graph_bar_what_is_barred_outside(device: Device) -> None:
    device.load(1, "[0-9]{2,4}")
    device.step([(0, 0, 2, 1), (1, 0, 1, 1)], admit(0, "ab"), admit(1, "x", grammar=0))
    device.finish()
    guided = device.grammars.guided(np.array([1, 0]))
    assert guided is not None
    barred, expected = torch.zeros(2, 2, len(device.grammars._spelled))
    lines = torch.from_numpy(device.grammars.lines(guided, 2))
    HostLogitOps().apply_bitmask(barred, device.grammars.masks, torch.arange(2), lines)
    device.grammars.mask(expected, guided)
    assert torch.equal(barred, expected)
    assert not barred[0].any() and barred[1].isfinite().sum() in (10, 11)


def test_rows_without_a_grammar_run_beside_as_they_always_do(device: Device) -> None:
    device.load(1, "[0-9]+")
    device.step([(1, 0, 1, 1)], admit(1, "x", grammar=0))
    device.step([(1, 1, 1, 1)])
    assert device.caught_up == 0
    device.step([(1, 2, 1, 1), (0, 0, 1, 1)], admit(0, "a"))
    device.step([(1, 3, 1, 1), (0, 1, 1, 1)])
    assert device.caught_up == 2
    assert device.said(0) == [*b"yz{|"] and device.said(1) == [*b"01"]


def test_a_prompt_in_chunks_is_masked_where_it_is_sampled(device: Device) -> None:
    device.load(1, "[0-9]+")
    device.step([(0, 0, 3, 0)], admit(0, "abcde"))
    device.step([(0, 3, 2, 1)])
    decode(device, 0, 5, 2)
    assert device.said() == [*b"012"]


def test_a_row_that_comes_back_goes_on_where_it_was(device: Device) -> None:
    device.load(1, "[0-9]{5}")
    device.step([(0, 0, 2, 1)], admit(0, "ab"))
    device.step([(0, 2, 1, 1)])
    assert device.said() == [*b"01"]
    device.step([(0, 3, 1, 1)])  # its result is not looked at: the row loses its place
    device.step([(2, 0, 4, 1)], admit(2, "ab", reply=b"01"))
    decode(device, 2, 4, 3)
    assert device.said()[3:] == [*b"234", END]


def test_a_slot_is_given_away_while_its_last_step_is_in_flight(device: Device) -> None:
    device.load(1, "[0-9]+")
    device.load(2, "[A-C]+")
    device.step([(0, 0, 1, 1)], admit(0, "a"))
    device.step([(0, 0, 1, 1)], admit(0, "b", grammar=2))
    device.step([(0, 0, 1, 1)], admit(0, "c", grammar=0))
    assert device.said() == [ord("0"), ord("A"), ord("d")]


def test_the_shortest_reply_gives_way_to_the_end_of_the_grammar(device: Device) -> None:
    device.load(1, "[0-9]{1,2}")
    stops = np.array([END], "<i4").tobytes()
    device.step([(0, 0, 1, 1)], admit(0, "a", min_tokens=9, stop_ids=stops))
    decode(device, 0, 1, 2)
    assert device.said() == [*b"01", END]


def test_other_wishes_give_way_to_the_end_of_the_grammar_alone(device: Device) -> None:
    device.load(1, "[0-9]{2}")
    five = np.array([ord("5")], "<i4").tobytes()
    device.step([(0, 0, 1, 1)], admit(0, "a", allowed_ids=five))
    decode(device, 0, 1, 2)
    assert device.said() == [*b"55", END]


def test_a_row_that_no_token_is_left_for_says_so_and_others_go_on(device: Device) -> None:
    device.load(1, "[0-9]{2}")
    letters = np.array([*b"xyz"], "<i4").tobytes()
    device.step([(0, 0, 1, 1), (1, 0, 1, 1)], admit(0, "a", allowed_ids=letters), admit(1, "a"))
    device.step([(0, 1, 1, 1), (1, 1, 1, 1)])
    first, second = device.finish()
    assert [done.stuck for done in (first, second)] == [((0, NO_TOKEN),)] * 2
    assert np.frombuffer(first.counts, "<i4").tolist() == [0, 1]
    assert device.said(0) == [] and device.said(1) == [*b"01"]


def test_a_grammar_that_cannot_be_loaded_fails_its_rows_alone(device: Device) -> None:
    assert "does not take the regex" in device.load(1, "(").cause
    device.step([(0, 0, 1, 1), (1, 0, 1, 1)], admit(0, "a"), admit(1, "a", grammar=0))
    (done,) = device.finish()
    assert "does not take the regex" in dict(done.stuck)[0] and device.said(1) == [ord("b")]


def test_a_grammar_that_outgrows_its_engine_says_so(
    device: Device, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a token, which `s: s s` has ever more ways to read, or at the mask after it; not that no token is left. The
    engine's own limit, of 2,000 items in a row, would take most of a minute to reach."""
    engine = grammars._engines.named("llguidance")
    assert (engine._limits.step_max_items, engine._limits.max_items_in_row) == (MOST_ITEMS, 2000)
    lower = llguidance.LLParserLimits(step_max_items=MOST_ITEMS, max_items_in_row=200)
    monkeypatch.setattr(engine, "_limits", lower)
    device.load(1, 'start: s\ns: s s | "a"', "lark")
    guided = Guided([0], [guide_of(grammars, admit(0, "a", reply=b"a" * 150))])
    (stuck,) = grammars.accept(guided, [ord("a")])
    assert stuck[1].startswith("the grammar cannot go on: Current row has 201 items; max is 200")
    assert stuck[1].endswith("; simplify it") and "state" not in stuck[1]


def test_a_grammar_that_is_dropped_stays_with_the_rows_that_have_it(device: Device) -> None:
    device.load(1, "[0-9]+")
    device.step([(0, 0, 1, 1)], admit(0, "a"))
    device.grammars.drop(1)
    decode(device, 0, 1, 1)
    assert device.said() == [*b"01"] and not device.grammars._loaded


def test_log_probabilities_are_those_of_the_model(device: Device) -> None:
    device.load(1, "[0-9]+")
    device.step([(0, 0, 1, 1)], admit(0, "a", logprobs=2))
    (done,) = device.finish()
    (scores,) = done.logprobs
    assert np.frombuffer(scores.top_ids, "<i4")[0] == ord("b")  # what it would have said
    assert np.frombuffer(scores.logprobs, "<f4")[0] < -100


def asked_of(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many masks the engine is asked for at a time, from now on."""
    engine = device.grammars._engines.named("llguidance")
    asked: list[int] = []
    fill = engine.fill
    monkeypatch.setattr(engine, "fill", lambda *given: asked.append(len(given[0])) or fill(*given))  # type: ignore[func-returns-value]
    return asked


SCHEMA = '{"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2}'


def test_rows_in_one_state_share_a_mask_now_and_later(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.load(1, SCHEMA, "json_schema")
    asked = asked_of(device, monkeypatch)
    admits = [admit(slot, text, reply=b'["') for slot, text in enumerate(("a", "a", "0", "a"))]
    device.step([(slot, 0, 3, 1) for slot in range(4)], *admits)
    assert asked == [1]
    decode(device, 0, 3, 3)
    said, before = device.said(), len(asked)
    assert bytes(said) == b'#$"\n'
    device.step([(2, 0, 3, 1)], admit(2, "x", reply=b'["'))
    decode(device, 2, 3, 3)
    assert device.said()[4:] == said and len(asked) == before


def test_the_line_that_was_used_the_longest_ago_is_given_away(grammars: Grammars, device: Device) -> None:
    """Here there are few lines: replies still get the masks of their own."""
    device.load(1, SCHEMA, "json_schema")
    grammars._table._used = grammars._table._used[: FIXED + SLOTS + 2]
    for _ in range(3):
        device.step([(0, 0, 3, 1)], admit(0, "a", reply=b'["'))
        decode(device, 0, 3, 3)
    assert bytes(device.said()) == b'#$"\n' * 3
    assert len(grammars._known[1]) == 2


def test_masks_of_a_grammar_that_is_dropped_are_forgotten(grammars: Grammars, device: Device) -> None:
    """Rows that still have it go on, and its masks are filled again."""
    device.load(1, SCHEMA, "json_schema")
    device.step([(0, 0, 3, 1)], admit(0, "a", reply=b'["'))
    decode(device, 0, 3, 1)
    table = grammars._table
    assert sum(owner is not None for owner in table._owners) == 2
    grammars.drop(1)
    assert not any(table._owners) and not grammars._known
    decode(device, 0, 4, 2)
    assert bytes(device.said()) == b'#$"\n'


def test_a_grammar_begins_behind_the_reasoning(device: Device, grammars: Grammars) -> None:
    device.load(1, "[0-9]{2}")
    guide = guide_of(grammars, admit(0, "a", after="</t>"))
    logits = torch.zeros(1, 257)

    def allowed() -> list[int]:
        masked = logits.clone()
        grammars.mask(masked, Guided([0], [guide]))
        return [int(id) for id in (masked[0] == 0).nonzero()[:, 0]]

    for token in b"x</</t":
        assert len(allowed()) == 257  # anything, an end too
        grammars.accept(Guided([0], [guide]), [token])
    grammars.accept(Guided([0], [guide]), [ord(">")])
    for token in b"12":
        assert allowed() == [*b"0123456789"]
        grammars.accept(Guided([0], [guide]), [token])
    assert allowed() == [END]


def test_the_reasoning_so_far_is_read_by_a_row_that_comes_back(device: Device, grammars: Grammars) -> None:
    device.load(1, "[0-9]{2}")
    inside = guide_of(grammars, admit(0, "a", reply=b"no</t", after="</t>"))
    behind = guide_of(grammars, admit(0, "a", reply=b"no</t>1", after="</t>"))
    assert (inside.after, inside.tail, behind.after) == (b"</t>", b"</t", b"")
    assert grammars.accept(Guided([0], [behind]), [ord("2")]) == ()
    assert grammars.accept(Guided([0], [behind]), [ord("3")]) == ((0, NO_TOKEN),)


@pytest.mark.parametrize("text", ["ab</t>cd", "</t>", "x</</t></t>", "a</t", "</</</t>"])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_end_of_the_reasoning_is_found_however_it_is_cut(text: str, size: int) -> None:
    guide = Guide(1, None, None, b"</t>", False)
    spoken, found = b"", None
    for at in range(0, len(text), size):
        if guide.after:
            spoken += text[at : at + size].encode()
            guide.pass_by(text[at : at + size].encode())
            found = len(spoken) if not guide.after else None
    first = text.find("</t>") + 4 if "</t>" in text else None
    assert (found is None) == (first is None)
    assert found is None or (first is not None and first <= found < first + size)
