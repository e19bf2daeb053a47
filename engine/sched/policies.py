"""Which policy orders the waiting queue."""

from engine.errors import PluginError, did_you_mean
from engine.plugin.registry import Plugins
from engine.plugin.specs import Policy

DEFAULT_POLICY = "fcfs"


def policy_name(plugins: Plugins, name: str = "auto") -> str:
    """Which policy `name` is: "auto" is one that --plugins names, else fcfs. Raises PluginError for none."""
    if name == "auto":
        named = sorted(name for kind, name in plugins.named if kind == "policies")
        if len(named) > 1:
            raise PluginError(f"--plugins names the policies {' and '.join(named)}; choose one with --policy")
        name = named[0] if named else DEFAULT_POLICY
    if name not in plugins.entries("policies"):
        listed = ", ".join(["auto", *plugins.entries("policies")])
        raise PluginError(f"unknown policy {name!r}{did_you_mean(name, plugins.entries('policies'))}; known: {listed}")
    return name


def make_policy(plugins: Plugins, name: str = "auto") -> Policy:
    """The policy that `policy_name` finds, constructed."""
    name = policy_name(plugins, name)
    policy: Policy = plugins.code("policies", name)()
    plugins.check("policies", name, policy)
    return policy
