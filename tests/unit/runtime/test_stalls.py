"""Who keeps whom waiting, from the last words of each rank's watchdog."""

import pytest

from engine.messages.control import Beat
from engine.runtime.stalls import stalled

NAMES = ["rank 0", "rank 1 (node 1 at 10.0.0.2)", "rank 2"]
IDLE = Beat(45, "", 122, 0.0)


def inside(number: int, seconds: float, step: int = 45, collective: str = "all_reduce") -> Beat:
    return Beat(step, collective, number, seconds)


def on_device(step: int, seconds: float) -> Beat:
    return Beat(46, "", 130, 0.0, step, seconds)


@pytest.mark.parametrize(
    ("beats", "ages", "told"),
    [
        ({0: IDLE, 1: IDLE}, [1.0, 1.0], ""),
        ({0: inside(123, 5.0), 1: IDLE}, [1.0, 1.0], ""),
        (
            {0: inside(123, 7.5), 1: IDLE},
            [0.5, 1.0],
            "rank 0 is in all_reduce 123 of step 45 for 8 s and waits for rank 1 (node 1 at 10.0.0.2), in no "
            "collective of step 45",
        ),
        (
            {0: inside(123, 9.0), 1: inside(122, 1.0, collective="all_gather")},
            [0.0, 0.0],
            "rank 0 is in all_reduce 123 of step 45 for 9 s and waits for rank 1 (node 1 at 10.0.0.2), in all_gather "
            "122 of step 45",
        ),
        (
            {0: inside(123, 8.0), 1: inside(123, 8.0)},
            [0.0, 0.0],
            "rank 0 is in all_reduce 123 of step 45 for 8 s, as are all it waits for: they do not reach each other; "
            "rank 1 (node 1 at 10.0.0.2) is in all_reduce 123 of step 45 for 8 s, as are all it waits for: they do "
            "not reach each other",
        ),
        (
            {0: inside(123, 6.0), 1: IDLE, 2: IDLE},
            [0.0, 8.0, 0.0],
            "no sign of life from rank 1 (node 1 at 10.0.0.2) for 8 s; rank 0 is in all_reduce 123 of step 45 for "
            "6 s and waits for rank 1 (node 1 at 10.0.0.2)",
        ),
        (
            {0: on_device(45, 9.0), 1: Beat(44, "", 122, 0.0)},
            [0.0, 0.0],
            "the device of rank 0 is at step 45 for 9 s and waits for rank 1 (node 1 at 10.0.0.2), which has begun "
            "step 44",
        ),
        (
            {0: on_device(45, 9.0), 1: on_device(45, 9.0)},
            [0.0, 0.0],
            "the device of rank 0 is at step 45 for 9 s, as are those of all others; the device of rank 1 (node 1 at "
            "10.0.0.2) is at step 45 for 9 s, as are those of all others",
        ),
        ({0: on_device(45, 5.0), 1: on_device(45, 5.0)}, [0.0, 0.0], ""),
        ({0: IDLE}, [0.0, 100.0], ""),  # one that never said a word is not silent: it has no watchdog
    ],
    ids=["idle", "short", "outside", "behind", "link", "silent", "device", "devices", "step", "without"],
)
def test_who_waits_for_whom(beats: dict[int, Beat], ages: list[float], told: str) -> None:
    assert stalled(beats, dict(enumerate(ages)), NAMES) == told
