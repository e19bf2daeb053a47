"""What runs in the next step. Pure: host integers in, StepPlans out; no torch, no input or output, no clock."""

from engine.sched.batcher import Scheduler

__all__ = ["Scheduler"]
