"""Figures of one H200 that the cost model was not made from, measured and simulated.

python -m bench.router.check
"""

from array import array

from bench.lib import workloads
from bench.router.worker import Call, Worker

MEASURED = {"throughput, output tok/s": 6109, "prefill, s": 3.09, "shared_prefix cold, s": 2.78, "warm, s": 2.42}


def seconds_of(work: workloads.Work, worker: Worker) -> float:
    """All of `work` at once on `worker`."""
    for number, (ids, count) in enumerate(work):
        worker.admit(Call(number, array("i", ids), array("i", [number] * count), array("Q")))
    seconds = 0.0
    while (step := worker.step()) is not None:
        seconds += step.seconds
    return seconds


def simulated() -> list[float]:
    """The figures of MEASURED."""
    work = workloads.throughput(100_000, 0)
    shared = Worker()
    return [
        workloads.tokens_out(work) / seconds_of(work, Worker()),
        seconds_of(workloads.prefill(100_000, 0), Worker()),
        *(seconds_of(part, shared) for part in workloads.shared_prefix(100_000, 0)),
    ]


def main() -> None:
    print(f"{'':26s} {'measured':>9s} {'simulated':>9s}  ratio")
    for (name, there), here in zip(MEASURED.items(), simulated(), strict=True):
        print(f"{name:26s} {there:9.2f} {here:9.2f}  {here / there:.2f}")


if __name__ == "__main__":
    main()
