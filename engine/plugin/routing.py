"""What a routing policy is written with, for plugins: the base class, and what it is told and says. Torch-free."""

from engine.router.policy import Arrival, Choice, RoutingPolicy, View

__all__ = ["Arrival", "Choice", "RoutingPolicy", "View"]
