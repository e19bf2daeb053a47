"""Tiny checkpoints with a tokenizer of one letter a token, and what replies of two engines have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models

from engine import Reply, SamplingParams

COMMON: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
ASKED = {  # every kind of wish that a row of logits is looked at for
    "greedy": SamplingParams(temperature=0, **COMMON),
    "drawn": SamplingParams(temperature=0.9, seed=7, **COMMON),
    "filtered": SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=8, **COMMON),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, **COMMON),
    "biased": SamplingParams(temperature=0.7, seed=9, logit_bias={3: 4.0, 90: 5.0, 4: -100.0}, **COMMON),
    "scored": SamplingParams(temperature=0, logprobs=4, prompt_logprobs=2, **COMMON),
    "guided": SamplingParams(temperature=1.0, seed=10, regex="[ā-ş]{5,9}", max_tokens=12),
    "guided to the end": SamplingParams(temperature=0, regex="[ā-Ź]{7}", max_tokens=12),
}


def save_checkpoint(model: Any, folder: Path) -> None:
    """Writes a `model` of transformers; token i is the character 0x100 + i."""
    model.save_pretrained(folder)
    size = model.config.get_text_config().vocab_size
    words = Tokenizer(models.WordLevel({chr(0x100 + i): i for i in range(size)}, unk_token=chr(0x100)))
    words.save(str(folder / "tokenizer.json"))


def assert_same(ours: Sequence[Reply], wanted: Sequence[Reply], tolerance: float = 1e-4) -> None:
    """Equal ids, and log-probabilities that differ by rounding alone."""
    assert [reply.ids for reply in ours] == [reply.ids for reply in wanted]
    for mine, other in zip(ours, wanted, strict=True):
        for kind in ("logprobs", "prompt_logprobs"):
            scores = [
                [
                    (step.logprob, [top.logprob for top in step.top])
                    for step in getattr(reply, kind)
                    if step.logprob is not None
                ]
                for reply in (mine, other)
            ]
            for (one, tops), (two, others) in zip(*scores, strict=True):
                torch.testing.assert_close(
                    torch.tensor([one, *tops]), torch.tensor([two, *others]), atol=tolerance, rtol=0
                )
