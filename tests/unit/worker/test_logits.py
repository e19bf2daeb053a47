"""Penalties, biases, bans, masks and log-probabilities: against Hugging Face's and naive ones, row by row."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from engine.kernels import choose
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.worker.sampling.adjustments import Adjustments
from engine.worker.sampling.logprobs import PIECE, score, score_prompt

VOCABULARY = 50
CPU = torch.device("cpu")
KERNELS = choose(CPU, torch.float32).logits
GENERATOR = np.random.default_rng(0)


def ids(*numbers):
    return np.array(numbers, "<i4").tobytes()


def adjusted(logits, *rows):
    """`logits` with row i of slot i: (prompt, reply so far, what its Sampling says)."""
    adjustments = Adjustments(len(rows) + 2, logits.shape[1], CPU, KERNELS)
    table = torch.from_numpy(GENERATOR.integers(0, VOCABULARY, (len(rows) + 2, 40)).astype(np.int32))  # stale tokens
    for slot, (prompt, reply, asked) in enumerate(rows):
        said = [*prompt, *reply]
        table[slot, : len(said)] = torch.tensor(said, dtype=torch.int32)
        sampling = Sampling(1.0, 0, 1.0, 0.0, 0, **asked)
        adjustments.admit([SlotAdmit(slot, ids(*said), sampling, len(prompt))])
    positions = np.array([len(prompt) + len(reply) for prompt, reply, _ in rows])
    out = logits.clone()
    adjustments.apply(out, np.arange(len(rows)), positions, table)
    return out


def logits_of(rows):
    return torch.from_numpy(GENERATOR.normal(scale=3, size=(rows, VOCABULARY)).astype(np.float32))


PROMPT, REPLY = [3, 7, 7, 9, 11], [7, 12, 12, 12, 3, 40]


def test_a_step_in_which_nobody_asks_is_left_alone():
    logits = logits_of(3)
    assert torch.equal(adjusted(logits, *[(PROMPT, REPLY, {})] * 3), logits)
    untouched = Adjustments(1, VOCABULARY, CPU, KERNELS)
    untouched.apply(logits, np.zeros(1, int), np.zeros(1, int), None)  # does not look at the table


def test_repetition_penalty_is_hugging_faces():
    logits = logits_of(1)
    for penalty in (1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + REPLY]), logits.clone())
        assert torch.equal(adjusted(logits, (PROMPT, REPLY, {"repetition_penalty": penalty})), expected)


def test_frequency_and_presence_penalties_count_the_reply_alone():
    logits = logits_of(1)
    expected = logits.clone()
    for token in set(REPLY):
        expected[0, token] -= 0.5 * REPLY.count(token) + 0.25
    got = adjusted(logits, (PROMPT, REPLY, {"frequency_penalty": 0.5, "presence_penalty": 0.25}))
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.equal(adjusted(logits, (PROMPT, [], {"frequency_penalty": 2.0, "presence_penalty": -2.0})), logits)


BAD = [[5], [12, 3, 40, 8], [40, 9], [41, 9], [3, 40, 10], [3, 40, 8], [1] * 30]


def test_bad_words_are_hugging_faces():
    logits = logits_of(1)
    processor = NoBadWordsLogitsProcessor(BAD, eos_token_id=None)
    for reply in (REPLY, [], [41], [3, 40], [12, 3, 40]):
        expected = processor(torch.tensor([PROMPT + reply]), logits.clone())
        assert torch.equal(
            adjusted(logits, (PROMPT, reply, {"bad_words": tuple(ids(*word) for word in BAD)})), expected
        )
    banned = adjusted(logits, (PROMPT, REPLY, {"bad_words": tuple(ids(*word) for word in BAD)})).isneginf()
    assert banned.nonzero()[:, 1].tolist() == [5, 8, 9, 10]


def test_biases_are_added_and_ids_that_the_model_lacks_are_passed_over():
    logits = logits_of(1)
    asked = {"bias_ids": ids(4, 60, 9), "biases": np.array([2.5, 9, -100], "<f4").tobytes()}
    expected = logits.clone()
    expected[0, 4] += 2.5
    expected[0, 9] -= 100
    assert torch.equal(adjusted(logits, (PROMPT, REPLY, asked)), expected)


@pytest.mark.parametrize(("said", "masked"), [(0, True), (5, True), (6, False), (7, False)])
def test_stop_ids_are_masked_until_min_tokens(said, masked):
    logits = logits_of(1)
    got = adjusted(logits, (PROMPT, [1] * said, {"min_tokens": 6, "stop_ids": ids(2, 49, 51)}))
    assert got.isneginf().nonzero()[:, 1].tolist() == ([2, 49] if masked else [])
    assert torch.equal(got[:, :2], logits[:, :2])


def test_only_allowed_ids_are_left():
    logits = logits_of(1)
    got = adjusted(logits, (PROMPT, REPLY, {"allowed_ids": ids(0, 7, 33, 50), "repetition_penalty": 2.0}))
    assert (~got.isneginf()).nonzero()[:, 1].tolist() == [0, 7, 33]
    assert got[0, 33] == logits[0, 33] and got[0, 7] != logits[0, 7]


ROWS = [
    (PROMPT, REPLY, {"repetition_penalty": 1.5}),
    (REPLY, PROMPT, {}),
    (PROMPT, [9], {"presence_penalty": 1.0, "bad_words": (ids(9, 4), ids(6))}),
    ([1], [], {"allowed_ids": ids(1, 2), "bias_ids": ids(1), "biases": np.array([5], "<f4").tobytes()}),
    (REPLY, REPLY, {"frequency_penalty": -1.0, "min_tokens": 20, "stop_ids": ids(0)}),
    (PROMPT * 3, REPLY, {"bad_words": (ids(3, 40, 8),), "repetition_penalty": 0.5}),
]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = logits_of(len(ROWS))
    together = adjusted(logits, *ROWS)
    for row in range(len(ROWS)):
        assert torch.equal(together[row : row + 1], adjusted(logits[row : row + 1], ROWS[row])), f"row {row}"


def test_a_slot_forgets_the_request_before():
    adjustments = Adjustments(1, VOCABULARY, CPU, KERNELS)
    asked = Sampling(1.0, 0, 1.0, 0.0, 0, repetition_penalty=2.0)
    adjustments.admit([SlotAdmit(0, ids(1), asked, 1)])
    adjustments.admit([SlotAdmit(0, ids(1), Sampling(1.0, 0, 1.0, 0.0, 0), 1)])
    logits = logits_of(1)
    before = logits.clone()
    adjustments.apply(logits, np.zeros(1, int), np.ones(1, int), torch.ones(1, 4, dtype=torch.int32))
    assert torch.equal(logits, before)


def test_bad_words_of_a_slot_outlive_those_of_others():
    """What precedes them lies in one table for all slots, which is packed anew."""
    adjustments = Adjustments(3, VOCABULARY, CPU, KERNELS)

    def admit(slot, **asked):
        adjustments.admit([SlotAdmit(slot, ids(*PROMPT), Sampling(1.0, 0, 1.0, 0.0, 0, **asked), len(PROMPT))])

    def banned():
        table = torch.tensor([PROMPT] * 3, dtype=torch.int32)
        logits = torch.zeros(3, VOCABULARY)
        adjustments.apply(logits, np.arange(3), np.full(3, len(PROMPT)), table)
        return [row.isneginf().nonzero()[:, 0].tolist() for row in logits]

    admit(0, bad_words=(ids(3, 4), ids(9, 11, 5)))
    admit(1, bad_words=(ids(8, 6), ids(11, 7), ids(2)))
    assert banned() == [[5], [2, 7], []]
    admit(0)
    assert banned() == [[], [2, 7], []]
    admit(2, bad_words=(ids(7, 9, 11, 1),))
    assert banned() == [[], [2, 7], [1]]
    admit(1, bias_ids=ids(1), biases=np.array([1.0], "<f4").tobytes())
    admit(0, min_tokens=3, stop_ids=ids(*range(40)))  # more edits than there was room for
    assert banned() == [list(range(40)), [], [1]]


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


def test_scores_are_log_softmax_with_ranks_and_the_likeliest():
    logits = logits_of(4)
    tokens = torch.tensor([3, 0, 49, int(logits[3].argmax())])
    scores = score(KERNELS, logits, tokens)
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(scores.logprobs.double(), expected[range(4), tokens], atol=1e-5)
    order = logits.argsort(dim=-1, descending=True)
    assert [int(order[row, rank - 1]) for row, rank in enumerate(scores.ranks)] == tokens.tolist()
    assert torch.equal(scores.top_ids, order[:, :20].to(torch.int32))
    assert torch.allclose(scores.top_logprobs.double(), expected.gather(1, order[:, :20]), atol=1e-5)
    told = scores.message(7, 1, 3, wide=2)
    assert told.row == 7 and np.frombuffer(told.ranks, "<i4").tolist() == scores.ranks[1:3].tolist()
    assert np.frombuffer(told.top_ids, "<i4").reshape(2, 2).tolist() == order[1:3, :2].tolist()
    assert scores.message(0, 0, 4, wide=0).top_ids == b""


def test_a_prompt_is_scored_piece_by_piece():
    hidden = torch.arange(7.0)[:, None]
    asked = []

    def logits(part):
        asked.append(len(part))
        return torch.cos(part * torch.arange(VOCABULARY))

    tokens = torch.arange(7)
    whole = score(KERNELS, logits(hidden), tokens)
    pieces = score_prompt(KERNELS, hidden, tokens, logits, PIECE // 3)
    assert asked == [7, 3, 3, 1]
    assert torch.equal(whole.logprobs, pieces.logprobs) and torch.equal(whole.top_ids, pieces.top_ids)
