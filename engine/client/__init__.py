"""What talks to an engine over HTTP, ours or another: a client, the chat in the terminal, the benchmarks."""
