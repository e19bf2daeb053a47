"""The options of a model that runs on several devices, and what they say of its ranks."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.errors import ConfigError
from engine.options.option import Positive
from engine.parallel.mesh import Mesh


class ParallelOptions(Struct, frozen=True, kw_only=True):
    """Several devices."""

    tp: Annotated[
        Positive, Meta(description="devices that each layer's weights are divided over, a worker process each")
    ] = 1
    pp: Annotated[
        Positive,
        Meta(description="stages that the layers are divided into, which steps pass in turn; each has --tp devices"),
    ] = 1
    dp_attention: Annotated[
        Positive,
        Meta(
            description="copies of attention, each with requests and a KV cache of its own, which the --tp devices are "
            "divided over; alone it sets --tp to the same"
        ),
    ] = 1
    ep: Annotated[
        Positive,
        Meta(
            description="groups of devices that a mixture's experts are divided over by number; it divides --tp, and "
            "alone sets that"
        ),
    ] = 1
    redundant_experts: Annotated[
        int,
        Meta(ge=0, description="copies of busy experts that each mixture has beside them, over all groups of --ep"),
    ] = 0
    ep_exchange: Annotated[
        Literal["auto", "gather", "all-to-all"],
        Meta(
            description="how tokens reach the experts of other devices: all devices get all tokens (gather), or each "
            "token goes where its experts are (all-to-all, where --ep is --tp); auto measures both, and chooses by the "
            "size of a step"
        ),
    ] = "auto"
    rebalance_threshold: Annotated[
        Annotated[float, Meta(ge=1)] | None,
        Meta(
            description="load of the busiest group of --ep, over the mean one, from which on experts are moved between "
            "groups; default: 1.2 with --redundant-experts, else they stay"
        ),
    ] = None
    rebalance_tokens: Annotated[Positive, Meta(description="tokens to count, at least, before experts are moved")] = (
        100_000
    )
    nnodes: Annotated[
        Positive, Meta(description="hosts that the devices are divided over evenly; each runs `engine serve`")
    ] = 1
    node_rank: Annotated[
        int, Meta(ge=0, description="which of the hosts this is; 0 serves HTTP, and the others serve it")
    ] = 0
    rendezvous: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="host:port of host 0, where the others join it"),
    ] = None
    dist_interface: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="network interface that hosts talk over, a name or an address: a private one; default: the one "
            "that leads to --rendezvous"
        ),
    ] = None
    token_file: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="file with the secret that hosts prove to each other; or ENGINE_TOKEN has it"),
    ] = None
    launcher: Annotated[
        Literal["none", "torchrun", "slurm", "lws"],
        Meta(
            description="whose variables say --nnodes, --node-rank and --rendezvous where these are left out: "
            "torchrun's, Slurm's, or a Kubernetes LeaderWorkerSet's"
        ),
    ] = "none"

    @property
    def whole_experts(self) -> bool:
        """Whether each of several devices of a stage holds some experts alone, and these whole."""
        return 1 < self.ep == self.tp

    @property
    def node_ranks(self) -> int:
        """How many workers a host has."""
        return self.ranks // self.nnodes

    @property
    def ranks(self) -> int:
        """How many workers there are."""
        return self.tp * self.pp

    def mesh(self, rank: int = 0) -> Mesh:
        """The ranks as `rank` sees them. Raises ConfigError for sizes that do not go together."""
        for flag, size in (("--ep", self.ep), ("--dp-attention", self.dp_attention)):
            if self.tp % size:
                raise ConfigError(f"{flag} {size} does not divide --tp {self.tp}; choose one that does")
        if self.ep_exchange == "all-to-all" and not self.whole_experts:
            raise ConfigError(
                f"--ep-exchange all-to-all sends tokens to devices that hold whole experts, and --ep {self.ep} of "
                f"--tp {self.tp} leaves none; say --ep {self.tp if self.tp > 1 else 2}, or --ep-exchange gather"
            )
        return Mesh(rank, tp=self.tp, pp=self.pp, ep=self.ep, dp=self.dp_attention)

    @property
    def reporters(self) -> range:
        """The ranks whose results are those of all: of the last stage the first of each copy of attention."""
        return range(self.ranks - self.tp, self.ranks, self.tp // self.dp_attention)
