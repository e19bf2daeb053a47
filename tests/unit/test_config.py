"""One declaration an option: flags, variables, bounds and docs/options.md all come from the structs."""

import re
from pathlib import Path

import msgspec
import pytest

from engine.config import Config, groups, resolve
from engine.errors import ConfigError
from engine.options.option import options_of
from engine.options.page import options_page
from engine.options.sizes import spell_size
from engine.router.options import UpOptions, router_groups

EVERYWHERE = [
    option for struct in (*groups().values(), *router_groups().values(), UpOptions) for option in options_of(struct)
]
SIZES = [option for option in EVERYWHERE if option.in_bytes]
ALL = [option for struct in groups().values() for option in options_of(struct)]


def test_defaults_are_the_structs() -> None:
    assert resolve({}) == Config()


def test_names_are_unique_across_groups() -> None:
    names = [option.name for option in ALL]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.name)
def test_every_option_is_described_and_reads_its_own_default(option) -> None:
    assert option.description
    assert option.expects
    assert option.read(option.default, option.flag) == option.default


def test_config_survives_the_wire() -> None:
    config = resolve({"plugins": "a,b", "memory_fraction": "0.5", "max_model_len": "100", "prefix_cache": "false"})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config
    assert config.model.plugins == ("a", "b")
    assert config.cache.memory_fraction == 0.5
    assert config.model.max_model_len == 100
    assert config.cache.prefix_cache is False


def test_the_command_line_overrules_the_environment() -> None:
    environ = {"ENGINE_MAX_RUNNING": "3", "ENGINE_PORT": "1", "PATH": "/bin"}
    config = resolve({"max_running": "5"}, environ)
    assert (config.schedule.max_running, config.server.port) == (5, 1)


def test_typed_values_are_taken_as_they_are() -> None:
    assert resolve({"plugins": ("a",), "max_running": 2, "threads": None}).model.plugins == ("a",)


@pytest.mark.parametrize("option", SIZES, ids=lambda option: option.variable)
def test_every_option_in_bytes_takes_numbers_and_units_and_refuses_others_by_name(option) -> None:
    for said, size in (("67108864", 1 << 26), ("64MiB", 1 << 26), ("1.5 mb", 1_500_000), (1 << 26, 1 << 26)):
        assert option.read(said, option.flag) == size
    if option.said_default:
        assert re.fullmatch(r"[1-9][0-9]*[MG]iB", option.said_default)
        assert option.read(option.said_default, option.flag) == option.default
    bounds = [option.read(bound, option.flag) for bound in re.findall(r"\d+\w*B", option.bounds)]  # least, then most
    beyond = [f"{bounds[0] - 1}", *(spell_size(most + 1) for most in bounds[1:])]
    for bad in (*beyond, "", "many", "64MiX", "1e3", "0x10", "9" * 31, "9" * 30, "99999999TiB", "1.5.1MB", 1.5, 2**70):
        with pytest.raises(ConfigError) as caught:
            option.read(bad, option.flag)
        for words in (f"{option.flag} is {bad!r}", "64MiB, or a number of bytes", *map(spell_size, bounds)):
            assert words in str(caught.value)


def test_no_option_that_speaks_of_bytes_is_a_bare_number_or_text() -> None:
    """Its name or what is said of it gives an option in bytes away; of another kind is only a path with a size."""
    speaks = re.compile(r"^\w*(memory|bytes)\w* |bytes|[0-9 ][KMGT]i?B\b")
    found = {
        option.name
        for option in EVERYWHERE
        if option.kind in (int, str) and speaks.search(f"{option.name} {re.sub('--[a-z-]+', '', option.description)}")
    }
    assert found - {option.name for option in SIZES} == {"kv_disk"}
    assert {option.name for option in SIZES} <= found, "another word that gives such options away"


@pytest.mark.parametrize(
    ("given", "environ", "said"),
    [
        ({"page_size": "300"}, {}, ["--page-size", "300", "from 1 to 256"]),
        ({"page_size": "1.5"}, {}, ["--page-size", "1.5", "an integer"]),
        ({"page_size": None}, {}, ["--page-size", "None", "an integer"]),
        ({"memory_fraction": "0"}, {}, ["--memory-fraction", "0", "above 0, at most 1"]),
        ({"memory_fraction": "nan"}, {}, ["--memory-fraction", "nan"]),
        ({"max_model_len": 0}, {}, ["--max-model-len", "0", "at least 1"]),
        ({"dtype": "flaot32"}, {}, ["--dtype", "'flaot32'", "bfloat16", "did you mean 'float32'"]),
        ({"prefix_cache": "maybe"}, {}, ["--prefix-cache", "true or false"]),
        ({"max_runing": 1}, {}, ["max_runing", "did you mean 'max_running'"]),
        ({}, {"ENGINE_PORT": "99999"}, ["ENGINE_PORT", "99999", "from 0 to 65535"]),
        ({}, {"ENGINE_MAX_RUNING": "1"}, ["ENGINE_MAX_RUNING", "did you mean 'ENGINE_MAX_RUNNING'"]),
    ],
)
def test_refusals_name_the_option_the_value_and_the_bound(given, environ, said) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(given, environ)
    for words in said:
        assert words in str(caught.value)


def test_no_number_is_taken_for_a_misspelt_one() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"fronts": "0"}, {})
    assert str(caught.value).startswith("--fronts is '0', but takes auto, 1, 2, ")
    assert "did you mean" not in str(caught.value)


def test_variables_of_other_programs_are_left_alone() -> None:
    assert resolve({}, {"ENGINE_XYZZY_QUUX": "1"}) == Config()


def test_options_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text() == options_page(groups().values(), router_groups().values()), (
        "docs/options.md is stale; run `make docs`"
    )
