"""Who keeps a group of ranks waiting, told by what each has last said of itself: pure, without a clock.

Each rank's watchdog sends a Beat a second, whatever the rank itself is doing. So one of whom nothing is heard is
stopped, or out of reach; and one that is in a collective for long waits for others, of which those that are not in it
are the cause. On a GPU, where collectives run after the call, a step that does not end is what is seen. Left out: which
collective of a CUDA graph that is.
"""

from collections.abc import Mapping, Sequence

from engine.messages.control import Beat

SILENT_SECONDS = 7.0  # without a beat
STALLED_SECONDS = 7.0  # in one collective
HELD_UP_SECONDS = 2.0  # in one collective, while another rank is silent


def stalled(beats: Mapping[int, Beat], ages: Mapping[int, float], names: Sequence[str]) -> str:
    """Who waits for whom, for people; empty where nobody has for long. `beats` are the last ones by rank, `ages` the
    seconds since they came, and `names` those of all ranks."""
    silent = [rank for rank in beats if ages[rank] > SILENT_SECONDS]
    enough = HELD_UP_SECONDS if silent else STALLED_SECONDS
    told = []
    if silent:
        seconds = max(ages[rank] for rank in silent)
        told.append(f"no sign of life from {_listed(silent, names)} for {seconds:.0f} s")
    for rank, beat in sorted(beats.items()):
        if rank in silent:
            continue
        inside, on_device = beat.seconds + ages[rank], beat.device_seconds + ages[rank]
        if beat.collective and inside > enough:
            where = f"{names[rank]} is in {beat.collective} {beat.number} of step {beat.step} for {inside:.0f} s"
            told.append(where + _for_whom(rank, beats, silent, names))
        elif not beat.collective and beat.on_device >= 0 and on_device > enough:
            where = f"the device of {names[rank]} is at step {beat.on_device} for {on_device:.0f} s"
            told.append(where + _for_which_device(rank, beats, silent, names))
    return "; ".join(told)


def _for_which_device(rank: int, beats: Mapping[int, Beat], silent: Sequence[int], names: Sequence[str]) -> str:
    """Whom a device may wait for: those that are not at its step."""
    if silent:
        return f" and waits for {_listed(silent, names)}"
    others = [other for other in beats if other != rank and beats[other].on_device != beats[rank].on_device]
    where = ", ".join(f"{names[other]}, which has begun step {beats[other].step}" for other in others)
    return f" and waits for {where}" if others else ", as are those of all others"


def _for_whom(rank: int, beats: Mapping[int, Beat], silent: Sequence[int], names: Sequence[str]) -> str:
    """Whom a rank in a collective waits for."""
    if silent:
        return f" and waits for {_listed(silent, names)}"
    others = [other for other in beats if other != rank]
    outside = [other for other in others if not beats[other].collective]
    if outside:
        where = ", ".join(f"{names[other]}, in no collective of step {beats[other].step}" for other in outside)
        return f" and waits for {where}"
    earlier = [other for other in others if _came(beats[other]) < _came(beats[rank])]
    if earlier:
        where = ", ".join(
            f"{names[other]}, in {beats[other].collective} {beats[other].number} of step {beats[other].step}"
            for other in earlier
        )
        return f" and waits for {where}"
    return ", as are all it waits for: they do not reach each other"


def _came(beat: Beat) -> tuple[int, int]:
    return beat.step, beat.number


def _listed(ranks: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(names[rank] for rank in ranks)
