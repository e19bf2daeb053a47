"""How requests can ask a step for the most memory: what the profile run before the KV cache is sized asks for."""

import numpy as np

from engine.params.sampling import MAX_BIASES, MAX_LOGPROBS, Sampling

PLAIN = Sampling(1.0, 0, 1.0, 0.0, 0)
FILTERED = Sampling(0.9, 50, 0.9, 0.01, 0)
PENALIZED = Sampling(1.0, 0, 1.0, 0.0, 0, presence_penalty=0.5)


def everything(vocab_size: int) -> Sampling:
    """All that a request can ask of its logits, at once."""
    ids = np.arange(min(MAX_BIASES, vocab_size), dtype="<i4")
    return Sampling(
        temperature=0.9,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        seed=0,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        bias_ids=ids.tobytes(),
        biases=np.ones(len(ids), "<f4").tobytes(),
        min_tokens=2,
        stop_ids=ids[:64].tobytes(),
        bad_words=(ids[:1].tobytes(), ids[:2].tobytes()),
        allowed_ids=np.arange(vocab_size, dtype="<i4").tobytes(),
        logprobs=MAX_LOGPROBS,
        prompt_logprobs=MAX_LOGPROBS,
    )
