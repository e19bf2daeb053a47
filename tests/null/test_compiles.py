"""The log says what requests waited for."""

import logging

import pytest
from triton import knobs

from engine.worker.compiles import tell_of_compiles


def test_a_kernel_that_is_compiled_while_requests_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, name, None)
    tell_of_compiles()
    caplog.set_level(logging.WARNING, "engine.worker")
    before, after = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    assert before is not None and after is not None
    asked = before(
        key="k", repr="draw[num_warps=4](logits)", fn=None, compile=None, is_manual_warmup=False, already_compiled=False
    )
    assert not asked, "it would keep Triton from compiling"
    after(
        key="k", repr="draw[num_warps=4](logits)", fn=None, compile=None, is_manual_warmup=False, already_compiled=False
    )
    assert "for a kernel to be compiled: draw[num_warps=4](logits)" in caplog.text
