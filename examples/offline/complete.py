"""Use the engine inside a program: a batch, a stream, a chat. No server.

python examples/offline/complete.py
"""

from engine import Engine, SamplingParams


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        params = SamplingParams(temperature=0, max_tokens=20)
        for reply in engine.generate(["1, 2, 3, 4,", "The capital of France is"], params):
            print(repr(reply.text), f"({reply.prompt_tokens} + {reply.completion_tokens} tokens, {reply.finish})")
        for chunk in engine.stream([{"role": "user", "content": "Say hello."}], SamplingParams(max_tokens=60)):
            print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
