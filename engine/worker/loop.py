"""The worker's loop: runs the steps it is sent, one launched ahead of the one it waits for, and answers questions.

A result is sent as soon as it is there, and a plan launched as soon as it comes: so the device goes from one step to
the next without a gap. All ranks get the same frames in the same order and launch the same steps; one of them reports
what came of each.
"""

from collections import deque

from engine.messages import ToWorker
from engine.messages.assets import Drop, Load
from engine.messages.control import Ask, Ping, Pong
from engine.messages.step import STEPS_IN_FLIGHT, StepPlan
from engine.messages.tiers import Move
from engine.options.parallel import ParallelOptions
from engine.parallel.progress import PROGRESS
from engine.runtime.channel import BlockingFrames
from engine.worker.experts import ExpertWatch, alone
from engine.worker.profiling import StepProfiler
from engine.worker.questions import Questions
from engine.worker.runner import Runner
from engine.worker.steps.results import Step

GLANCE = 5e-5  # seconds between two looks at the device, while a step runs and no plan has come


def serve(
    frames: BlockingFrames[ToWorker],
    runner: Runner,
    *,
    reports: bool = True,
    parallel: ParallelOptions = ParallelOptions(),  # noqa: B008
) -> None:
    """Runs steps until the peer closes; `reports`: and sends what came of them."""
    loop = Loop(frames, runner, reports, parallel)
    while (message := loop.next()) is not None:
        loop.handle(message)
        del message  # not held while the next one is waited for
    if runner.transfers is not None:
        runner.transfers.close()


class Loop:
    """Steps in flight, oldest first, and the trace of them, if one is made."""

    def __init__(
        self, frames: BlockingFrames[ToWorker], runner: Runner, reports: bool, parallel: ParallelOptions
    ) -> None:
        self._frames = frames
        self._runner = runner
        self._reports = reports
        self._in_flight: deque[Step] = deque()
        self._profiler = StepProfiler(runner.device)
        gathered = alone if runner.stage is None else runner.stage.pipeline.gathered
        self._experts = ExpertWatch(runner.model, gathered, parallel)
        self._questions = Questions(self._experts, self._profiler, lambda: len(self._in_flight))

    def next(self) -> ToWorker | None:
        """The next frame; meanwhile, steps that end are finished. None once the peer has closed."""
        while self._in_flight:
            if self._in_flight[0].ready():
                self._finish_first()
            elif self._frames.waiting(GLANCE):
                break
        if self._runner.stage is not None and not self._in_flight:
            self._runner.stage.listen()
        return self._frames.receive()

    def handle(self, message: ToWorker) -> None:
        runner = self._runner
        match message:
            case StepPlan():
                PROGRESS.step = message.step
                self._experts.step()
                # Where rows follow a grammar, the results before are sent while the model runs: what makes their masks
                # is what others need to plan on.
                if len(self._in_flight) == STEPS_IN_FLIGHT:  # in a pipeline: others may be on other stages
                    self._finish_first()
                with self._profiler.launching(message):
                    if runner.transfers is not None:
                        runner.transfers.follow(message)
                    self._in_flight.append(runner.launch(message, self._catch_up))
                PROGRESS.device_at(self._in_flight[0].step)
            case Load():
                runner.loaders[message.kind].load(message, self._frames.send)
            case Drop():
                runner.loaders[message.kind].drop(message.number)
            case Move():
                assert runner.transfers is not None, "a worker without tiers is told to move pages"
                runner.transfers.begin(message, self._frames.send)
            case Ask():
                self._frames.send(self._questions.answer(message))
            case Ping():
                self._frames.send(Pong())
            case _:
                raise AssertionError(f"a worker that runs got {type(message).__name__}")

    def _finish_first(self) -> None:
        with self._profiler.finishing():
            done = self._runner.finish(self._in_flight.popleft())
            PROGRESS.device_at(self._in_flight[0].step if self._in_flight else -1)
            if self._reports:
                self._frames.send(done)

    def _catch_up(self) -> None:
        while self._in_flight:
            self._finish_first()
