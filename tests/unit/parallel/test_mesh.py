"""The mesh: which ranks share what, for every combination of sizes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parallel.mesh import ALONE, AXES, Mesh

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    tp, pp = draw(SIZES), draw(SIZES)
    divisors = st.sampled_from([size for size in range(1, tp + 1) if tp % size == 0])
    return {"tp": tp, "pp": pp, "ep": draw(divisors), "dp": draw(divisors)}


def meshes(sizes: dict[str, int]) -> list[Mesh]:
    return [Mesh(rank, **sizes) for rank in range(sizes["tp"] * sizes["pp"])]


@given(sizes())
def test_each_axis_divides_all_ranks_into_groups_that_differ_along_it_alone(sizes: dict[str, int]) -> None:
    ranks = meshes(sizes)
    for axis in AXES:
        groups = ranks[0].groups(axis)
        assert sorted(itertools.chain(*groups)) == list(range(len(ranks)))
        assert all(len(group) == ranks[0].extent(axis) for group in groups)
        for mesh in ranks:
            assert mesh.groups(axis) == groups  # all ranks make all groups in one order
            assert mesh.group(axis)[mesh.coordinates[axis]] == mesh.rank


@given(sizes())
def test_coordinates_name_a_rank(sizes: dict[str, int]) -> None:
    for names in (("tp", "pp"), ("pp", "dp", "attention_tp"), ("pp", "ep", "expert_tp")):
        places = {tuple(mesh.coordinates[name] for name in names) for mesh in meshes(sizes)}
        assert len(places) == sizes["tp"] * sizes["pp"]


def test_neighbours_are_in_one_stage_and_in_one_copy_of_attention() -> None:
    mesh = Mesh(5, tp=4, pp=2, dp=2, ep=4)
    assert mesh.coordinates == {"tp": 1, "pp": 1, "ep": 1, "dp": 0, "attention_tp": 1, "expert_tp": 0}
    assert mesh.group("tp") == (4, 5, 6, 7) and mesh.group("pp") == (1, 5)
    assert mesh.group("attention_tp") == (4, 5) and mesh.group("dp") == (5, 7)


@given(sizes(), st.integers(1, 64))
def test_shares_are_the_whole_one_after_the_other(sizes: dict[str, int], each: int) -> None:
    first = meshes(sizes)[: sizes["tp"]]
    shares = [mesh.share(each * sizes["tp"]) for mesh in first]
    assert [share.start for share in shares] == [each * place for place in range(sizes["tp"])]
    assert shares[-1].stop == each * sizes["tp"]


@given(SIZES, st.integers(1, 200))
def test_uneven_shares_are_the_whole_one_after_the_other(tp: int, size: int) -> None:
    part = -(-size // tp)
    if size <= part * (tp - 1):
        with pytest.raises(ConfigError, match=rf"{size} tokens, {part} a rank.*the last of {tp} ranks"):
            Mesh(0, tp=tp).uneven_share(size, "tp", "tokens")
        return
    shares = [Mesh(rank, tp=tp).uneven_share(size, "tp", "tokens") for rank in range(tp)]
    assert list(itertools.chain(*(range(share.start, share.stop) for share in shares))) == list(range(size))
    assert {share.stop - share.start for share in shares[:-1]} <= {part}


@given(st.integers(1, 8), st.integers(1, 200_000))
def test_uneven_shares_have_whole_words_of_a_mask_where_that_costs_little(tp: int, size: int) -> None:
    part = -(-size // tp)
    if size <= part * (tp - 1):
        return
    shares = [Mesh(rank, tp=tp).uneven_share(size, "tp", "tokens", 32) for rank in range(tp)]
    assert [shares[0].start, *(share.stop for share in shares)] == [*(share.start for share in shares), size]
    assert all(share.stop - share.start <= part * 1.02 for share in shares) and shares[-1].stop > shares[-1].start
    if size >= 1600 * tp + 32 * tp * tp:
        assert all(share.start % 32 == 0 for share in shares)


@pytest.mark.parametrize(("heads", "tp"), [(8, 2), (2, 2), (1, 2), (2, 8), (3, 6)])
def test_each_query_head_is_where_its_key_value_head_is(heads: int, tp: int) -> None:
    queries = 24
    for rank in range(tp):
        mesh = Mesh(rank, tp=tp)
        query, kv = mesh.share(queries), mesh.repeated_share(heads, "tp", "heads")
        needed = {head * heads // queries for head in range(query.start, query.stop)}
        assert needed == set(range(kv.start, kv.stop))


@given(SIZES, st.integers(1, 40))
def test_stages_are_all_layers_one_after_the_other(pp: int, layers: int) -> None:
    if layers < pp:
        with pytest.raises(ConfigError, match=rf"{layers} layers.*{pp} stages.*at most {layers}"):
            Mesh(0, pp=pp).stage(layers)
        return
    stages = [Mesh(rank, pp=pp).stage(layers) for rank in range(pp)]
    assert list(itertools.chain(*stages)) == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tp": 0}, "tp is 0"),
        ({"tp": 4, "ep": 3}, "ep 3 does not divide tp 4"),
        ({"tp": 4, "dp": 8}, "dp 8 does not divide tp 4"),
        ({"rank": 4, "tp": 2, "pp": 2}, "rank 4 is none of the 4 ranks of tp 2 and pp 2"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_with_both(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mesh(**arguments)


def test_what_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="9 query heads do not divide over 2 ranks"):
        Mesh(0, tp=2).share(9, what="query heads")
    with pytest.raises(ConfigError, match="3 key-value heads can be neither divided over 4 ranks nor repeated"):
        Mesh(0, tp=4).repeated_share(3, "tp", "key-value heads")


def test_alone_a_rank_has_everything() -> None:
    assert ALONE.size == 1 and all(ALONE.group(axis) == (0,) for axis in AXES)
    assert ALONE.share(7) == slice(0, 7) and ALONE.stage(3) == range(3)
