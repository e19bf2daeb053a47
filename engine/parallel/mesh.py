"""The ranks of one model, and what each of them holds: plain integers, no torch.

    pp = 2, tp = 4      rank = stage * tp + place in the stage

    stage 0:  0 1 2 3   first layers, embedding
    stage 1:  4 5 6 7   last layers, head

A stage's ranks divide its layers among them (tensor parallelism). Two other sizes divide the same ranks again: with
`dp`, attention runs in that many copies, each with requests of its own and a tensor parallelism of tp / dp; with `ep`,
experts are divided by number over that many groups, and by width over the tp / ep ranks of a group. So the devices are
tp * pp, whatever `ep` and `dp` are.

Left out: context parallelism, stages of sizes that a user chooses.
"""

from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

Axis = Literal["tp", "pp", "ep", "dp", "attention_tp", "expert_tp"]
AXES: tuple[Axis, ...] = ("tp", "pp", "ep", "dp", "attention_tp", "expert_tp")
WITHIN: dict[Axis, tuple[Axis, ...]] = {  # what the ranks of one group along an axis have in common
    "tp": ("pp",),
    "pp": ("tp",),
    "ep": ("pp", "expert_tp"),
    "dp": ("pp", "attention_tp"),
    "attention_tp": ("pp", "dp"),
    "expert_tp": ("pp", "ep"),
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """The sizes of all axes, and which rank this is.

    Raises ConfigError for sizes that do not go together, and for a rank that is not one of theirs."""

    rank: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep", "dp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a parallel size is at least 1")
        for name, size in (("ep", self.ep), ("dp", self.dp)):
            if self.tp % size:
                raise ConfigError(f"{name} {size} does not divide tp {self.tp}; choose one that does")
        if not 0 <= self.rank < self.size:
            raise ConfigError(
                f"rank {self.rank} is none of the {self.size} ranks of tp {self.tp} and pp {self.pp}: they are "
                f"0 to {self.size - 1}"
            )

    @property
    def size(self) -> int:
        """How many ranks there are, hence devices."""
        return self.tp * self.pp

    def extent(self, axis: Axis) -> int:
        """How many ranks an axis has."""
        match axis:
            case "attention_tp":
                return self.tp // self.dp
            case "expert_tp":
                return self.tp // self.ep
            case _:
                size: int = getattr(self, axis)
                return size

    @property
    def coordinates(self) -> dict[Axis, int]:
        """This rank's place along each axis."""
        return self._coordinates(self.rank)

    def _coordinates(self, rank: int) -> dict[Axis, int]:
        stage, place = divmod(rank, self.tp)
        copy, attention = divmod(place, self.extent("attention_tp"))
        group, width = divmod(place, self.extent("expert_tp"))
        return {"tp": place, "pp": stage, "ep": group, "dp": copy, "attention_tp": attention, "expert_tp": width}

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All ranks in groups that differ along `axis` alone: by their places there, in the same order on each rank."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            coordinates = self._coordinates(rank)
            found.setdefault(tuple(coordinates[other] for other in WITHIN[axis]), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def group(self, axis: Axis) -> tuple[int, ...]:
        """The ranks of this rank's group along `axis`, this one among them."""
        return next(ranks for ranks in self.groups(axis) if self.rank in ranks)

    # ── what this rank holds ─────────────────────────────────────────────────────────────────

    def share(self, size: int, axis: Axis = "tp", what: str = "numbers") -> slice:
        """This rank's part of a dimension that is divided evenly along `axis`.

        Raises ConfigError where it does not divide; `what` names the dimension in it."""
        ranks, place = self.extent(axis), self.coordinates[axis]
        if size % ranks:
            options = "--tp over --dp-attention" if axis == "attention_tp" and self.dp > 1 else "--tp"
            raise ConfigError(
                f"{size} {what} do not divide over {ranks} ranks ({axis}); choose a number of ranks ({options}) that "
                f"divides {size}"
            )
        part = size // ranks
        return slice(place * part, (place + 1) * part)

    def repeated_share(self, size: int, axis: Axis, what: str) -> slice:
        """As `share`; of fewer things than there are ranks, this rank has one, as have others.

        Raises ConfigError where neither number divides the other."""
        ranks = self.extent(axis)
        if size >= ranks:
            return self.share(size, axis, what)
        if ranks % size:
            raise ConfigError(
                f"{size} {what} can be neither divided over {ranks} ranks nor repeated evenly ({axis}); choose a size "
                "that divides them, or a multiple of them"
            )
        one = self.coordinates[axis] * size // ranks
        return slice(one, one + 1)

    def uneven_share(self, size: int, axis: Axis, what: str, multiple: int = 1) -> slice:
        """This rank's part of a dimension that need not divide: all have as many, but for the last, which has the rest.
        They have a `multiple` of that number, where that makes their parts larger by a fiftieth at most.

        Raises ConfigError where nothing is left for the last."""
        ranks, place = self.extent(axis), self.coordinates[axis]
        part = -(-size // ranks)
        rounded = -(-part // multiple) * multiple
        if 50 * (rounded - part) <= part and size > rounded * (ranks - 1):
            part = rounded
        if size <= part * (ranks - 1):
            raise ConfigError(f"{size} {what}, {part} a rank, leave nothing for the last of {ranks} ranks ({axis})")
        return slice(place * part, min((place + 1) * part, size))

    def stage(self, layers: int) -> range:
        """The layers of this rank's stage; the first stages have one more where they do not divide.

        Raises ConfigError where there are more stages than layers."""
        if layers < self.pp:
            raise ConfigError(f"{layers} layers do not reach for {self.pp} stages (pp); choose at most {layers}")
        each, more = divmod(layers, self.pp)
        stage = self.coordinates["pp"]
        first = stage * each + min(stage, more)
        return range(first, first + each + (stage < more))


ALONE = Mesh()
