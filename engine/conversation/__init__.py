"""From messages and tools to a prompt, and from a reply back to text, reasoning and calls."""
