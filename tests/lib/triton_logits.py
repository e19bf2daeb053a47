"""Triton's kernels on logits against their definitions in torch: on a GPU (tests/gpu/test_logits_kernels.py), or
interpreted on a CPU (test_interpreted.py, which runs this in a process of its own)."""

from typing import Any

import numpy as np
import pytest
import torch
from drawing import filtered, sample

from engine.kernels.logits.bitmask import apply_bitmask
from engine.kernels.logits.draw import draw
from engine.kernels.logits.filters import cuts
from engine.kernels.logits.reference import EDITS, ID, LENGTH, START, UNTIL, VALUE, LogitOps, mask_words, pack_ids
from engine.kernels.logits.scores import score
from engine.kernels.logits.triton import TritonLogitOps
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.worker.sampling import adjustments as worker_logits
from engine.worker.sampling.logprobs import Scores
from engine.worker.sampling.sampler import Columns

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32000, 151936, 128256] if GPU else [70, 4100])
def test_bitmasks_leave_what_has_a_bit(size: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(size)
    allowed = [np.flatnonzero(generator.random(size) < share) for share in (0.5, 0.001, 1.0, 0.0)]
    mask = torch.from_numpy(np.stack([pack_ids(ids, size) for ids in allowed])).to(DEVICE)
    assert mask.shape == (4, mask_words(size))
    rows = torch.tensor([5, 0, 3, 2], device=DEVICE)
    logits = random(6, size + 3, dtype=dtype)[:, :size]  # of rows that do not follow each other
    for lines in (None, torch.tensor([3, 2, 0, 0], device=DEVICE)):
        got, wanted = logits.clone(), logits.clone()
        apply_bitmask(got, mask, rows, lines)
        LogitOps().apply_bitmask(wanted, mask, rows, lines)
        assert torch.equal(got, wanted)
        for i, row in enumerate(rows.tolist()):
            ids = allowed[i if lines is None else int(lines[i])]
            assert np.array_equal(np.flatnonzero(~got[row].isneginf().cpu().numpy()), ids)
        assert torch.equal(got[[1, 4]], logits[[1, 4]])


# ── filters ──────────────────────────────────────────────────────────────────────────────────

SHAPES = [(1, 151936), (7, 32000), (256, 128256)] if GPU else [(3, 4500)]
ASKED = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_k": 50, "temperature": 0.6},
    {"top_k": 1000000},
    {"top_p": 0.9},
    {"top_p": 0.95, "temperature": 0.6},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_p": 1e-6},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0, "temperature": 0.3},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"min_p": 0.02, "top_p": 0.7},
    {"min_p": 0.5, "top_p": 0.9},
    {"min_p": 0.3, "top_k": 50, "top_p": 0.9},
    {"min_p": 0.1, "top_k": 7, "top_p": 0.9, "temperature": 1.7},
    {"temperature": 0.0, "top_p": 0.1, "top_k": 3},
    {},
    {"top_p": 0.9, "temperature": 1e-30},
]


def noise(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def sharp(rows: int, size: int) -> torch.Tensor:
    """As trained models say it: most of the mass is in few tokens."""
    logits = 2 * noise(rows, size, 1) - 12
    places = torch.rand(rows, size, generator=torch.Generator().manual_seed(2)).topk(min(40, size // 2)).indices
    return logits.scatter_(1, places, 5 * noise(rows, places.shape[1], 3))


KINDS = {
    "flat": lambda rows, size: noise(rows, size, 4),
    "sharp": sharp,
    "steps": lambda rows, size: (2 * noise(rows, size, 5)).round(),  # equals everywhere
    "equal": lambda rows, size: torch.full((rows, size), -3.0),
    "signs": lambda rows, size: noise(rows, size, 6) * torch.tensor([0.0, 1e-30, 1e4, 30.0])[torch.arange(size) % 4],
    "banned": lambda rows, size: torch.where(noise(rows, size, 7) > 1.2, 3 * noise(rows, size, 8), -torch.inf),
    "nothing": lambda rows, size: torch.full((rows, size), -torch.inf),
}


def columns(asked: list[dict[str, float]]) -> Columns:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    built = Columns.empty(len(asked))
    for slot, fields in enumerate(asked):
        built.set(slot, Sampling(**{**off, "seed": slot * 1234567, **fields}))
    return built


def on_device(rows: Columns) -> tuple[torch.Tensor, ...]:
    numbers = (rows.temperature, rows.top_p, rows.min_p, rows.top_k.clip(max=2**31 - 1).astype(np.int32))
    return tuple(torch.from_numpy(column).to(DEVICE) for column in numbers)


def decided_by_rounding(row: torch.Tensor, asked: Columns, slot: int, different: torch.Tensor) -> bool:
    """Whether two cuts of `row` differ only where top-p's sum reaches its bound, or where min-p's bound is."""
    scores = (row.double() - row.max().double()) / float(asked.temperature[slot])
    near = (scores - np.log(max(float(asked.min_p[slot]), 1e-300))).abs() < 1e-5
    alone = columns([{"temperature": float(asked.temperature[slot])}])
    alone.top_k[0] = asked.top_k[slot]
    mass = filtered(row[None].cpu(), alone)[0].to(DEVICE).double().exp()
    order = row.sort(descending=True, stable=True).indices
    before = torch.zeros_like(mass).scatter_(0, order, mass[order].cumsum(0) - mass[order])
    near |= (before / mass.sum() - float(asked.top_p[slot])).abs() < 1e-5
    return bool(near[different].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuts_leave_what_the_definition_leaves(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    count, size = shape
    asking = ASKED if GPU or kind in ("flat", "sharp", "steps") else ASKED[::3]  # the interpreter is slow
    fields = [asking[row % len(asking)] for row in range(max(count, len(asking)))]
    logits = KINDS[kind](count, size).repeat(-(-len(fields) // count), 1)[: len(fields)].to(DEVICE, dtype)
    asked = columns(fields)
    slots = torch.arange(len(fields), device=DEVICE)
    floors, lasts = cuts(logits, slots, *on_device(asked))
    exact = logits.float()
    kept = (exact > floors[:, None]) | (
        (exact == floors[:, None]) & (torch.arange(size, device=DEVICE) <= lasts[:, None])
    )
    for row, wanted in enumerate(fields):
        if exact[row].max() == -torch.inf or wanted.get("temperature") == 0.0:
            assert kept[row].all(), wanted
            continue
        expected = filtered(exact[row : row + 1], columns([wanted]))[0] > -torch.inf
        different = (kept[row] & (exact[row] > -torch.inf)) != expected
        if different.any():
            assert decided_by_rounding(exact[row], asked, row, different), (wanted, different.nonzero()[:, 0].tolist())


def test_equals_at_a_bound_are_those_of_the_definition() -> None:
    """Of equals top-k and min-p keep all, top-p as many of the lowest ids as it takes: here the sums are exact."""
    size = 1 << 17 if GPU else 1 << 8
    likely = torch.arange(size) % 4 == 1
    logits = torch.where(likely, 2.0, -40.0).to(DEVICE)
    count, parts = size // 4, (1, 7, 8, 15)
    fields = [
        *({"top_p": part / 16} for part in parts),
        {"top_k": 3},
        {"min_p": 1.0},
        {"top_k": 3, "top_p": 0.5},
        {"top_k": 3, "top_p": 0.25, "min_p": 0.9},
        {"top_k": count + 1},
    ]
    kept = [*(count * part // 16 for part in parts), count, count, count // 2, count // 4, size]
    rows = logits.expand(len(fields), -1).contiguous()
    asked = columns(fields)
    floors, lasts = cuts(rows, torch.arange(len(fields), device=DEVICE), *on_device(asked))
    ids = torch.arange(size, device=DEVICE)
    stays = (rows > floors[:, None]) | ((rows == floors[:, None]) & (ids <= lasts[:, None]))
    assert stays.sum(1).tolist() == kept
    assert torch.equal(stays, filtered(rows, asked) > -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filtered_draws_are_those_of_the_definition(dtype: torch.dtype) -> None:
    count, size = (256, 151936) if GPU else (len(ASKED), 600)
    fields = [ASKED[row % len(ASKED)] for row in range(count)]
    asked = columns(fields)
    logits = sharp(count, size).to(DEVICE, dtype)
    slots = torch.arange(count, device=DEVICE)
    temperatures, *rest = on_device(asked)
    seeds = torch.from_numpy(asked.seed).to(DEVICE)
    lasts = torch.arange(count, device=DEVICE) * 5
    tokens = torch.zeros(count, int(lasts[-1]) + 2, dtype=torch.int32, device=DEVICE)
    cut = cuts(logits, slots, temperatures, *rest)
    lengths = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    got = draw(logits, slots, lasts, temperatures, seeds, tokens, lengths, cut)
    assert torch.equal(lengths, lasts + 2)
    wanted = sample(logits.float(), asked, lasts.cpu().numpy() + 1)
    assert (got == wanted).float().mean() >= (0.98 if GPU else 1.0)
    half = draw(logits[3:4], slots[3:4], lasts[3:4], temperatures, seeds, tokens, lengths, tuple(c[3:4] for c in cut))
    assert half.tolist() == got[3:4].tolist()


def test_a_cut_does_not_depend_on_other_rows() -> None:
    count, size = (64, 128256) if GPU else (6, 300)
    logits = (2 * noise(count, size, 9)).round().to(DEVICE)
    asked = columns([ASKED[(5 + row) % len(ASKED)] for row in range(count)])
    slots = torch.arange(count, device=DEVICE)
    floors, lasts = cuts(logits, slots, *on_device(asked))
    for row in range(0, count, 2):
        alone = cuts(logits[row : row + 1], slots[row : row + 1], *on_device(asked))
        assert (
            alone[0].tolist() == floors[row : row + 1].tolist() and alone[1].tolist() == lasts[row : row + 1].tolist()
        )


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["flat", "sharp", "steps", "equal"])
@pytest.mark.parametrize("shape", SHAPES if GPU else [(3, 70), (2, 4500)], ids=str)
def test_scores_are_those_of_the_definition(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    count, size = shape
    logits = KINDS[kind](count, size).to(DEVICE, dtype)
    rows = torch.arange(count, device=DEVICE).flip(0)
    tokens = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tokens[0] = logits[rows[0]].argmax()
    logprobs, ranks, top_ids, top_logprobs = score(logits, tokens, rows, 20)
    wanted = Scores(*LogitOps().score(logits[rows].double().float(), tokens, None, 20))
    assert torch.equal(ranks, wanted.ranks)
    torch.testing.assert_close(logprobs, wanted.logprobs, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(top_logprobs, wanted.top_logprobs, atol=2e-5, rtol=1e-6)
    order = logits[rows].sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_ids, order[:, :20].to(torch.int32))
    for got, each in zip(score(logits, tokens[rows], None, 20), (logprobs, ranks, top_ids, top_logprobs), strict=True):
        assert torch.equal(got, each[rows])


# ── penalties, biases, bans ──────────────────────────────────────────────────────────────────


def asking(slot: int, kind: int, size: int, prompt_len: int) -> SlotAdmit:
    """A request that asks for one of seven kinds of things; kind 2 for nothing."""
    generator = np.random.default_rng(3)

    def ids(*numbers: int) -> bytes:
        return np.array(numbers, "<i4").tobytes()

    several = np.sort(generator.choice(size, min(size // 2, 300), replace=False)).astype("<i4")
    words = tuple(ids(*generator.integers(0, 4, length)) for length in (1, 2, 2, 3, 3, 3, 30))
    asked: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": -0.25},
        {},
        {"repetition_penalty": 0.7, "presence_penalty": 1.0, "bad_words": words},
        {"bias_ids": several.tobytes(), "biases": generator.normal(size=len(several)).astype("<f4").tobytes()},
        {"min_tokens": 7, "stop_ids": ids(2, 5), "bias_ids": ids(5, 9), "biases": np.array([3, -100], "<f4").tobytes()},
        {"allowed_ids": several.tobytes(), "bad_words": words[::-1], "repetition_penalty": 1.1},
    ]
    return SlotAdmit(slot, b"", Sampling(1.0, 0, 1.0, 0.0, 0, **asked[kind]), prompt_len)


def adjustments_of(count: int, size: int, prompts: np.ndarray) -> worker_logits.Adjustments:
    """Each slot asks for something else; some for nothing."""
    adjustments = worker_logits.Adjustments(count, size, torch.device(DEVICE), LogitOps())
    adjustments.admit([asking(slot, slot % 7, size, int(prompts[slot])) for slot in range(count)])
    return adjustments


def applied(
    adjustments: worker_logits.Adjustments, logits: torch.Tensor, slots: np.ndarray, ends: np.ndarray, kind: str,
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:  # fmt: skip
    """`logits` [S, V] as the kernels of this `kind` adjust them; row s is of `slots[s]`, which has `ends[s]` tokens."""
    scratch = torch.zeros(5, logits.shape[1], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(adjustments, "_kernels", LogitOps() if kind == "reference" else TritonLogitOps())
    monkeypatch.setattr(adjustments, "_scratch", scratch)
    out = logits.clone()
    adjustments.apply(out, slots, ends, tokens)
    assert not scratch.any(), "the scratch must be left clean"
    return out


def test_adjustments_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    count, size, longest = (96, 151936, 5000) if GPU else (14, 640, 1100)
    generator = np.random.default_rng(4)
    positions = generator.integers(1, longest, count)
    positions[:7] = 1, 2, 5, 40, 1024, 1025, longest - 1
    positions[12] = 60
    prompts = (positions * generator.random(count)).astype(np.int64)
    prompts[[5, 12]] = positions[[5, 12]] - (7, 6)  # at the end of min_tokens, and one before
    adjustments = adjustments_of(count, size, prompts)
    tokens = torch.from_numpy(generator.integers(0, 4, (count, longest)).astype(np.int32))  # few, so words match
    tokens[::2] = torch.from_numpy(generator.integers(0, size, (len(tokens[::2]), longest)).astype(np.int32))
    tokens = tokens.to(DEVICE)
    slots = generator.permutation(count)
    logits = 3 * random(count, size)
    wanted, got = (
        applied(adjustments, logits, slots, positions[slots], kind, tokens, monkeypatch)
        for kind in ("reference", "triton")
    )
    assert torch.equal(got.isneginf(), wanted.isneginf()) and wanted.isneginf().any()
    finite = wanted.isfinite()
    torch.testing.assert_close(got[finite], wanted[finite], atol=1e-4, rtol=1e-5)
    changed = (wanted != logits).any(dim=1).cpu().numpy()
    assert np.array_equal(np.flatnonzero(~changed), np.flatnonzero(slots % 7 == 2))


def spoil(adjustments: worker_logits.Adjustments, tokens: torch.Tensor, ends: np.ndarray) -> None:
    """Leaves, wherever a slot has nothing, what a request before might have left: edits that act, which point beyond
    all prefixes, and tokens."""
    tables = adjustments._tables
    for slot, count in enumerate(tables.columns[EDITS].tolist()):
        stale = tables.edits[:, slot, count:]
        stale[ID], stale[UNTIL], stale[START] = 1, worker_logits.ALWAYS, 1 << 24
        stale[VALUE] = torch.full_like(stale[VALUE], 1000.0, dtype=torch.float32).view(torch.int32)
        stale[LENGTH] = torch.arange(stale.shape[1], device=DEVICE) % 3
        tokens[slot, int(ends[slot]) :] = 1
    idle = torch.from_numpy(~(adjustments._penalizes | adjustments._edits)).to(DEVICE)
    tables.columns[:, idle] = 1 << 20


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_nothing_is_read_of_who_had_a_slot_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, size, longest = (35, 4096, 300) if GPU else (7, 640, 60)
    generator = np.random.default_rng(5)
    ends = generator.integers(31, longest - 1, count)
    tokens = torch.from_numpy(generator.integers(0, 4, (count, longest)).astype(np.int32)).to(DEVICE)
    logits = random(count, size)
    clean = adjustments_of(count, size, ends // 2)
    slots = np.arange(count)
    wanted = applied(clean, logits, slots, ends, "reference", tokens, monkeypatch)
    used = adjustments_of(count, size, ends // 2)
    spoil(used, tokens, ends)
    got = applied(used, logits, slots, ends, kind, tokens, monkeypatch)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    for slot in range(count):  # as many edits as the row alone has, and no prefix of another's
        alone = applied(
            used, logits[slot : slot + 1], slots[slot : slot + 1], ends[slot : slot + 1], kind, tokens, monkeypatch
        )
        torch.testing.assert_close(alone[0], wanted[slot], atol=1e-4, rtol=1e-5)


def test_slots_that_pass_from_hand_to_hand_hold_what_new_ones_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of `adjustments_of` change places, some at a time, so that each kind follows each other kind."""
    slots, size, longest = (28, 4096, 300) if GPU else (4, 640, 60)
    generator = np.random.default_rng(6)
    tokens = torch.from_numpy(generator.integers(0, 4, (slots, longest)).astype(np.int32)).to(DEVICE)
    logits = random(slots, size)
    used = worker_logits.Adjustments(slots, size, torch.device(DEVICE), LogitOps())
    ends, kinds, every = np.zeros(slots, np.int64), np.full(slots, 2), np.arange(slots)
    for _ in range(20):
        admitted = generator.permutation(slots)[: generator.integers(1, slots + 1)]
        kinds[admitted], ends[admitted] = generator.integers(0, 7, len(admitted)), generator.integers(1, longest, 1)
        used.admit([asking(int(slot), int(kinds[slot]), size, int(ends[slot]) // 2) for slot in admitted])
        fresh = worker_logits.Adjustments(slots, size, torch.device(DEVICE), LogitOps())
        fresh.admit([asking(int(slot), int(kinds[slot]), size, int(ends[slot]) // 2) for slot in every])
        got = applied(used, logits, every, ends, "triton", tokens, monkeypatch)
        wanted = applied(fresh, logits, every, ends, "reference", tokens, monkeypatch)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
