"""How many steps may be in flight stands in one place."""

import subprocess
import sys
from typing import Any

from engine.actors.scheduler import SchedulerActor
from engine.config import Config, ModelOptions
from engine.messages.step import STEPS_IN_FLIGHT, steps_in_flight
from engine.options.parallel import ParallelOptions

OTHER = """
import engine.messages.step as step
step.STEPS_IN_FLIGHT = 7
from engine.actors.scheduler import SchedulerActor
from engine.config import Config, ModelOptions
from engine.layers.attention import Backend
from engine.runtime.core import PLANS
actor = SchedulerActor(Config(model=ModelOptions(model="echo")), None, None, executor=None, makers={}, front=None)
print(Backend.steps_in_flight, PLANS, actor.credits)
"""


def test_another_number_sizes_all_that_steps_take_turns_in() -> None:
    """And the scheduler sends no more plans than that, which with a Reset fit into the executor's mailbox."""
    done = subprocess.run([sys.executable, "-c", OTHER], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["7", "8", "6"], done.stderr


def test_each_stage_of_a_pipeline_has_a_step_more() -> None:
    nothing: Any = None
    for stages in (1, 2, 5):
        config = Config(model=ModelOptions(model="echo"), parallel=ParallelOptions(pp=stages))
        actor = SchedulerActor(config, nothing, nothing, executor=nothing, makers={}, front=nothing)
        assert actor.most_credits == steps_in_flight(stages) == STEPS_IN_FLIGHT + stages - 1
        assert actor.credits == stages + 1
