"""Several fronts: what a step says to each is what it says, of that front's requests alone."""

from array import array
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevice, sampling

from engine.messages.reply import Tokens
from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.sched import Scheduler
from engine.sched.fronts import LIFE, front_of, front_of_number, numbers_of
from engine_plugins.policies.order import FirstComeFirstServed


def test_keys_and_numbers_name_their_front() -> None:
    for front in (0, 1, 9, 15, 16, 255):
        for life in (0, 1, 70):
            numbers = numbers_of(front, life)
            for number in [next(numbers) for _ in range(300)]:
                assert front_of(format(number, "x")) == front_of_number(number) == front
                assert life * LIFE <= number < (life + 1) * LIFE
    assert not {next(numbers_of(3, life)) for life in range(9)} & {next(numbers_of(4, life)) for life in range(9)}


def by_request(messages: list[Tokens]) -> dict[str, dict[str, Any]]:
    """What is said of each request, whatever row it has."""
    found: dict[str, dict[str, Any]] = {}
    for message in messages:
        tokens, at = array("i", message.tokens), 0
        for row, (rid, count) in enumerate(zip(message.rids, array("i", message.counts), strict=True)):
            assert rid not in found
            said: dict[str, Any] = {"tokens": tokens[at : at + count].tolist()}
            at += count
            for name in ("finishes", "logprobs", "prompt_logprobs"):
                said[name] = [array_of(item) for item in getattr(message, name) if item.row == row]
            for name in ("cached", "prefills", "vectors"):
                said[name] = [value for place, value in getattr(message, name) if place == row]
            found[rid] = said
        assert at == len(tokens)
        rows = [item.row for name in ("finishes", "logprobs", "prompt_logprobs") for item in getattr(message, name)]
        rows += [row for name in ("cached", "prefills", "vectors") for row, _ in getattr(message, name)]
        assert all(0 <= row < len(message.rids) for row in rows)
    return found


def array_of(item: Any) -> list[Any]:
    """All fields of a part but its row."""
    return [getattr(item, name) for name in item.__struct_fields__ if name != "row"]


class Pair:
    """Two schedulers that get the same, one for one front and one for several, each with a device of its own."""

    def __init__(self, fronts: int, burst: int) -> None:
        self.fronts = fronts
        self.both = [
            Scheduler(
                pages=64, page_size=4, slots=6, max_model_len=200, max_step_tokens=32, policy=FirstComeFirstServed(),
                prefix_cache=True, max_waiting=100, drafts=burst - 1, fronts=count,
            )
            for count in (1, fronts)
        ]  # fmt: skip
        self.devices = [SimulatedDevice(64, 4, 6, 32, burst) for _ in self.both]
        self.flying: list[list[Any]] = [[], []]

    def plan(self) -> bool:
        for scheduler, device, flying in zip(self.both, self.devices, self.flying, strict=True):
            if (plan := scheduler.plan()) is not None:
                flying.append(device.run(plan))
        return bool(self.flying[0])

    def commit(self) -> None:
        alone, several = self.both
        if not self.flying[0]:
            return
        one = alone.commit(self.flying[0].pop(0))
        each = several.commit_each(self.flying[1].pop(0))
        for message in each:
            assert len({front_of(rid) for rid in message.rids}) == 1
        fronts = [front_of(message.rids[0]) for message in each]
        assert fronts == sorted(set(fronts))
        assert by_request(each) == by_request([one] if one else [])
        several.check_integrity()

    def end(self, rid: str) -> None:
        assert self.both[0].stop(rid) == self.both[1].stop(rid)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), fronts=st.integers(2, 5), burst=st.sampled_from([1, 1, 3]))
def test_each_front_is_told_of_all_its_requests_and_no_others(data: st.DataObject, fronts: int, burst: int) -> None:
    pair = Pair(fronts, burst)
    numbers = [numbers_of(front, 0) for front in range(fronts)]
    live: list[str] = []
    for _ in range(data.draw(st.integers(5, 40))):
        match data.draw(st.sampled_from(["admit", "admit", "step", "step", "step", "stop"])):
            case "admit":
                rid = format(next(numbers[data.draw(st.integers(0, fronts - 1))]), "x")
                ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=40))
                stop = data.draw(st.sampled_from([(), (1,)]))
                scored = data.draw(st.sampled_from([-1, -1, 2]))
                asked = sampling(data.draw(st.integers(0, 3)), "", scored, scored)
                new = data.draw(st.integers(1, 12))
                for scheduler in pair.both:
                    scheduler.admit(Admit(rid, array("i", ids).tobytes(), asked, stop, new))
                live.append(rid)
            case "step":
                pair.plan()
                if len(pair.flying[0]) > data.draw(st.integers(0, 2)):
                    pair.commit()
            case "stop" if live:
                pair.end(live.pop(data.draw(st.integers(0, len(live) - 1))))
    while pair.plan():
        pair.commit()


def test_vectors_go_to_the_front_that_asked() -> None:
    scheduler = Scheduler(
        pages=0, page_size=4, slots=4, max_model_len=50, max_step_tokens=64, policy=FirstComeFirstServed(),
        prefix_cache=True, max_waiting=10, fronts=3,
    )  # fmt: skip
    for rid in ("0", "2", "100"):
        scheduler.admit(Admit(rid, array("i", [1, 2]).tobytes(), sampling(0), (), 0))
    plan = scheduler.plan()
    assert plan is not None
    vectors = array("f", [1, 2, 3]).tobytes()
    said = scheduler.commit_each(StepDone(plan.step, b"", b"", 0.0, vectors=vectors))
    assert [message.rids for message in said] == [["0", "100"], ["2"]]
    one, two, three = (array("f", [value]).tobytes() for value in (1, 2, 3))
    assert [message.vectors for message in said] == [((0, one), (1, three)), ((0, two),)]
