"""The device process with the echo model: tables, two steps in flight, how it starts and how it ends."""

import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from engine.config import CacheOptions, Config, ModelOptions, ProcessOptions, ScheduleOptions
from engine.errors import ConfigError
from engine.messages import FromWorker
from engine.messages.control import Answer, Ask, Boot, Fatal, Ping, Pong, WorkerReady
from engine.messages.questions import CountExperts
from engine.messages.questions import Echo as EchoQuestion
from engine.messages.step import SlotAdmit, StepDone, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.specs import KVGroup, KVSpec
from engine.plugin.testing import MODEL_SCENARIOS, check_model
from engine.runtime.channel import BlockingFrames
from engine.testing.steps import step_plan
from engine.worker.loop import serve
from engine.worker.memory import allocate, available_memory, choose_max_model_len, count_pages
from engine_plugins.checkpoints.echo import END, EchoCheckpoint
from engine_plugins.models.echo import Echo

CPU = torch.device("cpu")


# ── the process ──────────────────────────────────────────────────────────────────────────────


def config(**changes):
    fields = {
        "model": ModelOptions(model="echo"),
        "cache": CacheOptions(kv_tokens=512, page_size=4),
        "schedule": ScheduleOptions(max_running=4),
        "process": ProcessOptions(device="cpu", threads=1),
    }
    return Config(**{**fields, **changes})


@contextmanager
def worker(boot):
    """A worker process that was sent `boot`, and our end of its socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "engine.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(60)
        try:
            frames = BlockingFrames(ours, receives=FromWorker)
            frames.send(boot)
            yield process, frames
        finally:
            process.kill()
            process.wait()


def admit(slot, ids, temperature=0.0):
    return SlotAdmit(slot, np.array(ids, "<i4").tobytes(), Sampling(temperature, 0, 1.0, 0.0, 11))


def tokens_of(done):
    assert np.frombuffer(done.counts, "<i4").tolist() == [1] * (len(done.tokens) // 4)
    return np.frombuffer(done.tokens, "<i4").tolist()


def test_a_worker_counts_answers_pings_and_ends_with_its_peer():
    with worker(Boot(config())) as (process, frames):
        ready = frames.receive()
        assert isinstance(ready, WorkerReady), ready
        assert (ready.pages, ready.page_size, ready.slots, ready.vocab_size) == (128, 4, 4, 257)
        assert (ready.max_model_len, ready.device, ready.kv_bytes_per_token) == (512, "cpu", 4)
        assert list(ready.phases) == ["import", "checkpoint", "weights", "grammars", "kv cache", "warm-up"]

        frames.send(Ping())
        assert frames.receive() == Pong()

        asked = EchoQuestion({"a": [1, "b"]})
        frames.send(Ask(7, asked.packed()))
        answer = frames.receive()
        assert isinstance(answer, Answer) and (answer.number, answer.cause) == (7, "")
        assert asked.read(answer.value) == {"a": [1, "b"]}
        frames.send(Ask(8, CountExperts("start").packed()))
        answer = frames.receive()
        assert (answer.number, answer.value) == (8, b"") and "no experts" in answer.cause

        # A prompt of five in chunks of three and two, beside one of one; then decode, sent without waiting.
        process.send_signal(signal.SIGINT)  # the parent's business
        pages = [(0, 0, 9), (0, 1, 3), (2, 0, 50), (0, 2, 7), (2, 1, 1), (2, 2, 2)]
        first = step_plan(1, [(0, 0, 3, 0), (2, 0, 1, 1)], [admit(0, [1, 2, 3, 4, 253]), admit(2, [40], 1.0)], pages)
        frames.send(first)
        frames.send(step_plan(2, [(2, 1, 1, 1), (0, 3, 2, 1)]))
        for step in range(3, 9):
            frames.send(step_plan(step, [(0, step + 2, 1, 1), (2, step - 1, 1, 1)]))
        done = [frames.receive() for _ in range(8)]
        assert [reply.step for reply in done] == list(range(1, 9))
        assert [tokens_of(reply) for reply in done[:2]] == [[41], [42, 254]]
        assert [tokens_of(reply) for reply in done[2:]] == [[(255 + i) % 256, 43 + i] for i in range(6)]
        assert all(isinstance(reply, StepDone) and reply.seconds > 0 for reply in done)

        frames.send(step_plan(9, []))
        assert tokens_of(frames.receive()) == []
        frames._socket.close()
        assert process.wait(30) == 0


class Script:
    """Frames and runner in one, that write down what `serve` does; a step is ready once no plan is left."""

    device = torch.device("cpu")
    stage = transfers = None
    model = torch.nn.Identity()

    def __init__(self, *messages):
        self.messages, self.done = list(messages), []

    def waiting(self, seconds):
        return bool(self.messages)

    def receive(self):
        self.done.append("receive")
        return self.messages.pop(0) if self.messages else None

    def send(self, message):
        self.done.append(f"send {message}")

    def launch(self, step_plan, catch_up):
        self.done.append(f"launch {step_plan.step}")
        return SimpleNamespace(step=step_plan.step, ready=lambda: not self.messages)

    def finish(self, step):
        self.done.append(f"finish {step.step}")
        return step.step


def test_a_plan_that_comes_is_launched_before_a_result_is_waited_for():
    script = Script(step_plan(1, []), step_plan(2, []))
    serve(script, script)
    launches = ["receive", "launch 1", "receive", "launch 2"]
    assert script.done == [*launches, "finish 1", "send 1", "finish 2", "send 2", "receive"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_count():
    with worker(Boot(config(process=ProcessOptions(device="cuda")))) as (_, frames):
        assert isinstance(frames.receive(), WorkerReady)
        frames.send(step_plan(1, [(0, 0, 3, 1)], [admit(0, [1, 2, 3])], [(0, 0, 9), (0, 1, 3)]))
        frames.send(step_plan(2, [(0, 3, 1, 1)]))
        assert [tokens_of(frames.receive()) for _ in range(2)] == [[4], [5]]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"cache": CacheOptions(kv_tokens=64, page_size=4), "model": ModelOptions(model="echo", max_model_len=65)},
         "--max-model-len 65 is over the 64 tokens that the KV cache holds"),
        ({"model": ModelOptions(model="echo", max_model_len=4097)}, "over the model's own limit of 4096"),
        ({"model": ModelOptions(model="no/such/model/anywhere")}, "no/such/model/anywhere"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_work_is_told_in_a_sentence(changes, cause):
    with worker(Boot(config(**changes))) as (process, frames):
        fatal = frames.receive()
        assert isinstance(fatal, Fatal) and fatal.actor == "worker 0"
        assert cause in fatal.cause and "Traceback" not in fatal.cause
        assert process.wait(30) == 1


def test_a_crash_is_told_with_its_traceback():
    with worker(Boot(config())) as (process, frames):
        assert isinstance(frames.receive(), WorkerReady)
        frames.send(step_plan(1, [(99, 0, 1, 1)]))  # there is no slot 99
        fatal = frames.receive()
        assert isinstance(fatal, Fatal) and "IndexError" in fatal.cause and "Traceback" not in fatal.cause
        assert "Traceback" in fatal.details and "runner.py" in fatal.details
        assert process.wait(30) == 1


def test_a_peer_that_leaves_before_boot_leaves_no_worker():
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "engine.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        ours.close()
        assert process.wait(30) == 0


# ── the echo model and its checkpoint ────────────────────────────────────────────────────────


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_echo_keeps_the_contract_of_models(scenario):
    def reference(ids):
        logits = torch.full((len(ids), 257), -100.0)
        return logits.scatter_(1, (torch.tensor(ids)[:, None] + 1) % 256, 100.0)

    check_model(Echo, {}, {}, reference, scenario)


def test_the_echo_tokenizer_is_bytes():
    spec = EchoCheckpoint.open("echo").text()
    text = "Grüße, 世界\n\t\x00"
    ids = spec.tokenizer.encode(text).ids
    assert bytes(ids) == text.encode()
    assert spec.tokenizer.decode(ids) == text
    assert spec.eos_ids == (END,) and spec.tokenizer.get_vocab_size() == END + 1
    assert EchoCheckpoint.open("echoes") is None


# ── KV memory ────────────────────────────────────────────────────────────────────────────────

SPEC = KVSpec(16, (KVGroup(2, (2, 16, 3, 64), "bfloat16"), KVGroup(1, (16, 8), "uint8")))


def test_pages_fill_the_share_of_memory_but_no_more_than_can_be_used():
    assert SPEC.page_bytes == 2 * 2 * 16 * 3 * 64 * 2 + 16 * 8
    free = available_memory(CPU)
    pages = count_pages(SPEC, CacheOptions(memory_fraction=0.5), CPU, 0, most_tokens=16)
    assert pages == pytest.approx(free * 0.5 / SPEC.page_bytes, rel=0.1)
    half = count_pages(SPEC, CacheOptions(memory_fraction=0.5), CPU, 0, most_tokens=16, ranks=2)
    assert half == pytest.approx(pages / 2, rel=0.2)  # others take and give back memory meanwhile
    assert count_pages(SPEC, CacheOptions(), CPU, 0, most_tokens=33) == 3
    assert count_pages(SPEC, CacheOptions(), CPU, 0, most_tokens=1 << 40) * SPEC.page_bytes <= 4 << 30
    assert count_pages(SPEC, CacheOptions(kv_tokens=1000), CPU, 0, most_tokens=16) == 62


@pytest.mark.parametrize(
    ("options", "weights", "said"),
    [
        (CacheOptions(kv_tokens=15), 0, "--kv-tokens 15 is less than one page of 16 tokens"),
        (CacheOptions(kv_tokens=1 << 50), 0, "needs .* free; at most"),
        (CacheOptions(memory_fraction=1e-9), 1 << 30, "--memory-fraction 1e-09 of .* 1 GiB of weights"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(options, weights, said):
    with pytest.raises(ConfigError, match=said):
        count_pages(SPEC, options, CPU, weights, most_tokens=1 << 20)


def test_the_longest_sequence_is_what_model_and_cache_allow():
    assert choose_max_model_len(None, 4096, 1000) == 1000
    assert choose_max_model_len(None, 512, 1000) == 512
    assert choose_max_model_len(300, 512, 1000) == 300


def test_a_model_that_keeps_nothing_has_no_pages_and_its_own_length():
    spec = KVSpec(16, ())
    for options in (CacheOptions(), CacheOptions(kv_tokens=1000), CacheOptions(memory_fraction=1e-9)):
        assert count_pages(spec, options, CPU, 1 << 30, most_tokens=1 << 20) == 0
    assert allocate(spec, 1, CPU) == ()
    assert (choose_max_model_len(None, 512, None), choose_max_model_len(99, 512, None)) == (512, 99)
    with pytest.raises(ConfigError, match="513 is over the model's own limit of 512"):
        choose_max_model_len(513, 512, None)


def test_caches_start_as_zeros():
    caches = allocate(SPEC, 5, CPU)
    assert [len(group) for group in caches] == [2, 1]
    assert caches[0][0].shape == (5, 2, 16, 3, 64) and caches[0][0].dtype == torch.bfloat16
    assert not any(cache.any() for group in caches for cache in group)


def test_plans_cross_the_socket_as_they_are():
    sent = step_plan(3, [(1, 2, 3, 1)], [admit(1, [4, 5])], [(1, 0, 8)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=StepPlan) == sent
