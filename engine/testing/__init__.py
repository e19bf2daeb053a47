"""A fake device, and contract checks for plugins; authors import them from engine.plugin.testing."""
