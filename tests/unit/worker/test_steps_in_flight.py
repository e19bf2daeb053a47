"""How many steps may be in flight stands in one place."""

import subprocess
import sys

OTHER = """
import engine.messages.step as step
step.STEPS_IN_FLIGHT = 7
import torch
from engine.actors.scheduler import SchedulerActor
from engine.config import Config, ModelOptions
from engine.layers.attention import Backend
from engine.layers.batch import Mirror
from engine.runtime.core import PLANS
mirror = Mirror(2, torch.device("cpu"))
hosts = {mirror.host().ctypes.data for _ in range(50)}
actor = SchedulerActor(Config(model=ModelOptions(model="echo")), *[None] * 5)
print(len(hosts), Backend.steps_in_flight, PLANS, actor.credits)
"""


def test_another_number_sizes_all_that_steps_take_turns_in() -> None:
    """And the scheduler sends no more plans than that, which with a Reset fit into the executor's mailbox."""
    done = subprocess.run([sys.executable, "-c", OTHER], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["7", "7", "8", "6"], done.stderr
