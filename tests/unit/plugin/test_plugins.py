"""The plugin manager against distributions made up on the spot: what it loads, what it refuses, what it chooses."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import Distribution
from pathlib import Path
from textwrap import dedent

import pytest

from engine.errors import ConfigError, PluginError
from engine.plugin import hub
from engine.plugin import registry as manager
from engine.plugin.registry import HOOKS, Plugins, resolve

Distribute = Callable[..., None]

POLICY = """
from engine.plugin import hookimpl

@hookimpl
def register_policies(register):
    register("{name}", "{module}:Reverse")

class Reverse:
    needs_match = False

    def order(self, waiting, matched):
        return list(range(len(waiting)))[::-1]
"""

FORMAT = """
from engine.plugin import hookimpl

@hookimpl
def register_checkpoints(register):
    register("toy", "toy_format:Toy", models={"toy-1b": "a toy"})

class Toy:
    @classmethod
    def open(cls, model):
        opened = cls()
        opened.model = model
        return opened if model == "toy-1b" or model.endswith(".toy") or "toyhub" in model else None
"""


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distribute:
    """Pretend that a distribution is installed: `distribute("dist", {"entry point": "module"}, module="source")`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, points: Mapping[str, str], **modules: str) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{point} = {module}" for point, module in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[engine.plugins]", *lines]) + "\n")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(dedent(source))
            monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def refused(*named: str) -> str:
    with pytest.raises(PluginError) as caught:
        Plugins.load(named)
    return str(caught.value)


# ── loading ──────────────────────────────────────────────────────────────────────────────────


def test_built_ins_come_through_the_same_hooks() -> None:
    plugins = Plugins.load()
    assert "llama" in plugins.models
    assert "torch" in plugins.attention
    assert "fp8" in plugins.quantization
    assert {"gguf", "safetensors"} <= set(plugins.checkpoints)
    assert {"fcfs", "lpm"} <= set(plugins.policies)
    assert {row.state for row in plugins.listing() if row.distribution == "actorserve"} == {"loaded"}


def test_registries_are_frozen() -> None:
    plugins = Plugins.load()
    with pytest.raises(TypeError):
        plugins.models["x"] = plugins.models["llama"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        plugins.models = {}  # type: ignore[misc]


def test_the_metadata_of_a_distribution_is_read_once(distribute: Distribute, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the whole README in it, and takes longer than all else."""
    distribute("engine-two", {"one": "one_manifest", "two": "two_manifest"}, one_manifest="", two_manifest="")
    read = []
    metadata = Distribution.metadata.fget
    monkeypatch.setattr(Distribution, "metadata", property(lambda self: read.append(self) or metadata(self)))
    rows = Plugins.load(["one", "two"]).listing()
    assert {row.distribution for row in rows} == {"actorserve"}
    assert len(read) == len(set(read)) == 2


def test_a_kept_register_cannot_change_a_frozen_registry(distribute: Distribute) -> None:
    source = """
    from engine.plugin import hookimpl
    kept = []

    @hookimpl
    def register_policies(register):
        kept.append(register)
    """
    distribute("late", {"late": "late_manifest"}, late_manifest=source)
    plugins = Plugins.load(["late"])
    sys.modules["late_manifest"].kept[0]("sneaky", "late_manifest:kept")
    assert "sneaky" not in plugins.policies


def test_third_parties_are_imported_only_when_named(distribute: Distribute) -> None:
    distribute("engine-reverse", {"reverse": "reverse_manifest"}, reverse_manifest="raise RuntimeError('imported')")
    plugins = Plugins.load()
    assert "reverse_manifest" not in sys.modules
    (row,) = (row for row in plugins.listing() if row.distribution == "engine-reverse")
    assert (row.name, row.version, row.state, row.hooks) == ("reverse", "1.2", "available", ())


def test_a_named_third_party_is_loaded_and_all_it_registers_is_named(distribute: Distribute) -> None:
    source = POLICY.format(name="backwards", module="reverse_manifest")
    distribute("engine-reverse", {"reverse": "reverse_manifest"}, reverse_manifest=source)
    plugins = Plugins.load(["reverse"])
    (row,) = (row for row in plugins.listing() if row.distribution == "engine-reverse")
    assert (row.name, row.kind, row.state, row.hooks) == ("backwards", "policies", "named", ("register_policies",))
    assert plugins.policy("auto").order([1, 2], [0, 0]) == [1, 0]
    assert plugins.policy("fcfs").order([1, 2], [0, 0]) == [0, 1]  # asked for by name, it still is itself


def test_an_unknown_name_lists_the_known_and_the_nearest(distribute: Distribute) -> None:
    distribute("engine-reverse", {"reverse": "reverse_manifest"}, reverse_manifest="")
    said = refused("llamma")
    assert "'llamma'" in said
    assert "did you mean 'llama'" in said
    for name in ("gguf", "fcfs", "torch", "reverse"):
        assert name in said


def test_a_failing_import_stops_the_start_with_its_own_traceback(distribute: Distribute) -> None:
    distribute("broken", {"broken": "broken_manifest"}, broken_manifest="import no_such_module_of_mine")
    with pytest.raises(PluginError, match=r"'broken' of broken 1\.2 .*no_such_module_of_mine") as caught:
        Plugins.load(["broken"])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_failing_hook_stops_the_start_with_its_own_traceback(distribute: Distribute) -> None:
    source = """
    from engine.plugin import hookimpl

    @hookimpl
    def register_models(register):
        raise LookupError("mine")
    """
    distribute("broken", {"broken": "broken_manifest"}, broken_manifest=source)
    with pytest.raises(
        PluginError, match=r"'broken' of broken 1.2: register_models fails: LookupError: mine"
    ) as caught:
        Plugins.load(["broken"])
    assert isinstance(caught.value.__cause__, LookupError)


def test_two_that_register_one_name_are_both_named(distribute: Distribute) -> None:
    distribute("engine-reverse", {"one": "one_manifest"}, one_manifest=POLICY.format(name="fcfs", module="m"))
    said = refused("one")
    assert "'fcfs' among policies" in said
    assert "actorserve 0.1.0 and engine-reverse 1.2" in said


def test_two_distributions_with_one_entry_point_are_both_named(distribute: Distribute) -> None:
    distribute("dist-a", {"one": "a_manifest"}, a_manifest="")
    distribute("dist-b", {"one": "b_manifest"}, b_manifest="")
    assert Plugins.load()  # not named: no concern of ours
    said = refused("one")
    assert "dist-a 1.2" in said
    assert "dist-b 1.2" in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("@hookimpl\ndef register_modles(register): ...", ["'register_modles'", "did you mean 'register_models'"]),
        ("def register_modles(register): ...", ["'register_modles'", "did you mean 'register_models'"]),
        ("@hookimpl\ndef frobnicate(register): ...", ["'frobnicate'", *HOOKS]),
        ("def register_models(register): ...", ["register_models", "@hookimpl"]),
        ("@hookimpl\ndef register_models(registry): ...", ["registry"]),
    ],
)
def test_a_hook_that_would_never_run_is_refused(distribute: Distribute, source: str, said: list[str]) -> None:
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=f"from engine.plugin import hookimpl\n\n{source}\n")
    message = refused("odd")
    for words in ["'odd' of odd 1.2", *said]:
        assert words in message


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('"x", "m:X", architecture=("A",)', ["'architecture'", "did you mean 'architectures'"]),
        ('"x", "m:X"', ["architectures"]),
        ('"x", "m:X", architectures="LlamaForCausalLM"', ["architectures"]),
        ('"x", "not a target", architectures=("A",)', ["module:attribute", "'not a target'"]),
        ('"x"', ["target"]),
    ],
)
def test_a_wrong_registration_names_plugin_and_field(distribute: Distribute, call: str, said: list[str]) -> None:
    source = f"""
    from engine.plugin import hookimpl

    @hookimpl
    def register_models(register):
        register({call})
    """
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=source)
    message = refused("odd")
    for words in ["'odd' of odd 1.2", *said]:
        assert words in message


def test_an_entry_point_must_be_a_module(distribute: Distribute) -> None:
    distribute("odd", {"odd": "odd_manifest:manifest"}, odd_manifest="manifest = {}")
    assert "must name a module" in refused("odd")


def test_resolve_chains_the_cause() -> None:
    assert resolve("engine.errors:PluginError") is PluginError
    with pytest.raises(PluginError, match=r"engine.errors:Nothing") as caught:
        resolve("engine.errors:Nothing")
    assert isinstance(caught.value.__cause__, AttributeError)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────

MODELS = """
from engine.plugin import hookimpl

@hookimpl
def register_models(register):
    register("llama-fast", "fast:Model", architectures=("LlamaForCausalLM",))
    register("other", "fast:Model", architectures=("OtherForCausalLM",))

@hookimpl
def register_attention(register):
    register("quick", "fast:Quick", devices=("cuda",), preference=-5)
"""


def test_a_model_is_found_by_architecture() -> None:
    assert Plugins.load().model_for(["LlamaForCausalLM"]).name == "llama"
    with pytest.raises(PluginError, match=r"FooForCausalLM.*LlamaForCausalLM"):
        Plugins.load().model_for(["FooForCausalLM"])


def test_a_named_model_wins(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS)
    plugins = Plugins.load(["fast"])
    assert plugins.model_for(["LlamaForCausalLM"]).name == "llama-fast"
    assert plugins.model_for(["MistralForCausalLM"]).name == "llama"  # the package has nothing for it
    assert Plugins.load(["fast", "other"]).model_for(["OtherForCausalLM"]).name == "other"
    with pytest.raises(PluginError, match="llama and llama-fast"):
        Plugins.load(["fast", "llama"]).model_for(["LlamaForCausalLM"])


def test_a_model_named_in_vain_is_refused() -> None:
    with pytest.raises(PluginError, match=r"llama serves LlamaForCausalLM.*FooForCausalLM"):
        Plugins.load(["llama"]).model_for(["FooForCausalLM"])


def test_attention_is_chosen_by_preference_unless_named(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS.replace("-5", "99").replace('"quick"', '"quickest"'))
    entry, reason = Plugins.load().attention_for("cpu")
    assert entry.name == "cpu"
    assert "before torch" in reason
    assert [other.name for other in Plugins.load().attention_after(entry, "cpu")] == ["torch"]
    named, _ = Plugins.load(["cpu"]).attention_for("cpu")
    assert Plugins.load(["cpu"]).attention_after(named, "cpu") == []
    entry, reason = Plugins.load(["fast"]).attention_for("cuda")
    assert (entry.name, reason) == ("quickest", "named in --plugins")
    with pytest.raises(PluginError, match="'quickest', which runs on cuda, not on cpu"):
        Plugins.load(["fast", "quickest"]).attention_for("cpu")
    with pytest.raises(PluginError, match=r"'tpu'.*torch"):
        Plugins.load().attention_for("tpu")


def test_a_named_attention_wins_over_a_preferred_one(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS)  # preference -5: below torch
    assert Plugins.load(["fast"]).attention_for("cuda")[0].name == "quick"


QUANTIZATIONS = """
from engine.plugin import hookimpl

@hookimpl
def register_quantization(register):
    register("four", "fast:Four", methods=("awq",))
    register("eight", "fast:Eight", methods=("fp8",))
"""


def test_a_quantization_is_the_checkpoints_or_the_named_one(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=QUANTIZATIONS)

    def chosen(method: str | None, *named: str) -> str:
        found = Plugins.load(named).quantization_for(method)
        assert found is not None
        return f"{found[0].name}: {found[1]}"

    assert Plugins.load().quantization_for(None) is None
    assert chosen("fp8") == "fp8: the checkpoint's quant_method is fp8"
    assert chosen("fp8", "fast").startswith("eight: ")
    assert chosen("awq", "fast").startswith("four: ")
    assert chosen(None, "fp8") == "fp8: named in --plugins: weights are quantized as they are loaded"
    assert chosen(None, "fast", "four").startswith("four: ")
    with pytest.raises(PluginError, match=r"'awq', which no quantization reads; known: fp8 reads fp8"):
        chosen("awq")
    with pytest.raises(PluginError, match=r"names the quantization 'four', which reads awq; .* is 'fp8'"):
        chosen("fp8", "fast", "four")
    with pytest.raises(PluginError, match="names the quantizations fp8 and four"):
        chosen(None, "fast", "four", "fp8")
    with pytest.raises(PluginError, match="fp8 and eight all read"):
        chosen("fp8", "fast", "eight", "fp8")


def test_latent_attention_has_backends_of_its_own_under_the_same_names(distribute: Distribute) -> None:
    plugins = Plugins.load()
    entry, reason = plugins.attention_for("cuda", latent=True)
    assert entry.name == "flashinfer" and "Latent" in entry.target and "before torch (0), triton (20)" in reason
    assert [other.name for other in plugins.attention_after(entry, "cuda", latent=True)] == ["triton", "torch"]
    assert plugins.attention_for("cpu", latent=True)[0].name == "torch"
    for latent in (False, True):
        entry, reason = Plugins.load(["triton"]).attention_for("cuda", latent)
        assert (entry.name, reason) == ("triton", "named in --plugins") and ("Latent" in entry.target) is latent
        with pytest.raises(PluginError, match="backend 'triton', which runs on cuda, not on cpu"):
            Plugins.load(["triton"]).attention_for("cpu", latent)
    with pytest.raises(PluginError, match="names cpu, which is no latent attention backend; there is torch, triton"):
        Plugins.load(["cpu"]).attention_for("cpu", latent=True)
    distribute("fast", {"fast": "fast"}, fast=MODELS)  # has none: the choice is ours
    assert Plugins.load(["fast"]).attention_for("cuda", latent=True)[0].name == "flashinfer"


def test_policies() -> None:
    plugins = Plugins.load()
    assert plugins.policy("auto").order(["a", "b"], [0, 9]) == [0, 1]
    assert Plugins.load(["lpm"]).policy().order(["a", "b"], [0, 9]) == [1, 0]
    with pytest.raises(PluginError, match="unknown policy 'fcsf'; did you mean 'fcfs'"):
        plugins.policy("fcsf")
    with pytest.raises(PluginError, match="fcfs and lpm; choose one with --policy"):
        Plugins.load(["lpm", "fcfs"]).policy()


# ── opening a checkpoint ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def toys(distribute: Distribute) -> Plugins:
    distribute("toys", {"toys": "toy_format"}, toy_format=FORMAT)
    return Plugins.load(["toys"])


def test_an_embedded_name_goes_to_its_format(toys: Plugins) -> None:
    assert toys.open_checkpoint("toy-1b").model == "toy-1b"  # type: ignore[attr-defined]


def test_a_path_goes_to_the_format_that_knows_it(toys: Plugins, tmp_path: Path) -> None:
    path = str(tmp_path / "a.toy")
    assert toys.open_checkpoint(path).model == path  # type: ignore[attr-defined]


def test_a_hub_id_is_fetched(toys: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(model: str, **kwargs: list[str]) -> str:
        calls.append((model, kwargs))
        return "/cache/toyhub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert toys.open_checkpoint("org/model").model == "/cache/toyhub"  # type: ignore[attr-defined]
    ((model, kwargs),) = calls
    assert model == "org/model"
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(kwargs["allow_patterns"])


def test_a_cold_cache_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(model: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"org/model is not in the local cache.*HF_HUB_OFFLINE"):
        hub.download("org/model")


@pytest.mark.parametrize("model", ["no-such-model", "no/such/model", "./no-model", "../no/model"])
def test_what_is_nothing_lists_what_model_takes(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plugins.load().open_checkpoint(model)
    for words in (model, ".gguf file", "Hugging Face id"):
        assert words in str(caught.value)


@pytest.mark.parametrize("model", ["/no/model.gguf", "no/model.gguf"])
def test_a_missing_gguf_file_is_no_hub_id(model: str) -> None:
    with pytest.raises(ConfigError, match=f"no file {model}"):
        Plugins.load().open_checkpoint(model)


def test_a_near_miss_of_an_embedded_name_is_told(toys: Plugins) -> None:
    with pytest.raises(ConfigError, match="did you mean 'toy-1b'"):
        toys.open_checkpoint("toy-1c")


# ── the example for authors ──────────────────────────────────────────────────────────────────

EXAMPLE = Path(__file__).parents[3] / "examples" / "third_party_plugin"


def test_the_example_package_loads_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "example-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["engine.plugins"]
    (info / "entry_points.txt").write_text("[engine.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = Plugins.load(list(points)).policy()

    class Waiting:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

    waiting = [Waiting([1] * 10), Waiting([1] * 4), Waiting([1] * 7)]
    assert policy.order(waiting, [0, 0, 0]) == [1, 2, 0]  # type: ignore[arg-type]
    assert policy.order(waiting, [9, 0, 0]) == [0, 1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "options", "said"),
    [
        ((), {}, []),
        (("lpm",), {}, ["scheduling policy: lpm (named in --plugins)"]),
        (("fcfs",), {}, ["scheduling policy: fcfs (named in --plugins)"]),
        ((), {"policy": "lpm"}, ["scheduling policy: lpm (--policy)"]),
        (("lpm",), {"policy": "fcfs"}, ["scheduling policy: fcfs (--policy)"]),
        (("llguidance",), {}, ["grammar engines: llguidance (named in --plugins)"]),
    ],
)
def test_what_the_user_names_is_confirmed(
    caplog: pytest.LogCaptureFixture, named: tuple[str, ...], options: dict[str, str], said: list[str]
) -> None:
    from engine.config import resolve
    from engine.runtime.launch import say_scheduling

    with caplog.at_level("INFO", logger="engine"):
        say_scheduling(Plugins.load(named), resolve(options))
    assert caplog.messages == said


def test_loading_leaves_torch_alone() -> None:
    program = """
import sys
from engine.plugin.registry import Plugins
plugins = Plugins.load()
plugins.model_for(["LlamaForCausalLM"]), plugins.attention_for("cpu"), plugins.policy()
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_grammar_engines_are_asked_in_order_and_a_named_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"llguidance", "xgrammar"}

    def version(package: str) -> str:
        if package not in installed:
            raise manager.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(manager, "version", version)
    assert [entry.name for entry in Plugins.load().grammar_engines()] == ["llguidance", "xgrammar"]
    assert [entry.name for entry in Plugins.load(("xgrammar",)).grammar_engines()] == ["xgrammar"]
    installed.remove("xgrammar")
    assert [entry.name for entry in Plugins.load().grammar_engines()] == ["llguidance"]
    with pytest.raises(PluginError, match="not installed; pip install xgrammar"):
        Plugins.load(("xgrammar",)).grammar_engines()
