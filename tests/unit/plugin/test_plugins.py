"""The registry against distributions made up on the spot: what it loads, what it refuses, what it chooses."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from textwrap import dedent

import pytest

from engine.errors import ConfigError, EngineError, PluginError
from engine.grammars import engines
from engine.grammars.engines import grammar_engines
from engine.plugin import Waiting, hub
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.hookspecs import KINDS
from engine.plugin.registry import Plugins, resolve
from engine.sched.policies import make_policy
from engine.worker.choices import attention_after, attention_for, model_for, quantization_for
from engine.worker.tiers import make_tier

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
        opened.name = opened.config = opened.text = opened.tensors = None
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
    assert "llama" in plugins.entries("models")
    assert "torch" in plugins.entries("attention")
    assert "fp8" in plugins.entries("quantization")
    assert {"gguf", "safetensors"} <= set(plugins.entries("checkpoints"))
    assert {"fcfs", "lpm"} <= set(plugins.entries("policies"))
    assert {row.state for row in plugins.listing() if row.distribution == "actorserve"} == {"loaded"}


def test_registries_are_frozen() -> None:
    plugins = Plugins.load()
    with pytest.raises(TypeError):
        plugins.entries("models")["x"] = plugins.entries("models")["llama"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        plugins.registries = {}  # type: ignore[misc]


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
    assert "sneaky" not in plugins.entries("policies")


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
    assert make_policy(plugins, "auto").order([1, 2], [0, 0]) == [1, 0]
    assert make_policy(plugins, "fcfs").order([1, 2], [0, 0]) == [0, 1]  # asked for by name, it still is itself


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
        ("@hookimpl\ndef frobnicate(register): ...", ["'frobnicate'", *(f"register_{kind}" for kind in KINDS)]),
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


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("models", "", "lacks 'architectures', which must be a tuple of texts such as ('a', 'b')"),
        ("models", "architectures='A'", "architectures is 'A', and must be a tuple of texts such as ('a', 'b')"),
        ("models", "architectures=()", "architectures is (), and must be a tuple of texts"),
        ("attention", "devices=('gpu',)", "devices is ('gpu',), and must be a tuple of 'cpu' or 'cuda'"),
        ("attention", "devices=('cpu',), preference=1.5", "preference is 1.5, and must be a whole number"),
        (
            "grammars",
            "kinds=('choices',), package='p'",
            "kinds is ('choices',), and must be a tuple of 'json_object' or",
        ),
        ("tiers", "", "lacks 'kind', which must be 'pool' or 'store'"),
        ("parsers", "kind='tols'", "kind is 'tols', and must be 'tool' or 'reasoning'"),
    ],
)
def test_a_field_that_would_never_be_chosen_is_refused(
    distribute: Distribute, kind: str, fields: str, said: str
) -> None:
    source = f"""
    from engine.plugin import hookimpl

    @hookimpl
    def register_{kind}(register):
        register("x", "m:X", {fields})
    """
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=source)
    assert f"plugin 'odd' of odd 1.2: register('x'){'' if said.startswith('lacks') else ':'} {said}" in refused("odd")


def test_a_distribution_named_for_its_plugin_is_told_the_name(distribute: Distribute) -> None:
    distribute("odd-llama", {"odd": "odd_manifest"}, odd_manifest="")
    assert refused("odd-llama") == "unknown plugin 'odd-llama'; the distribution odd-llama has 'odd', so name that"
    assert "did you mean 'odd'" in refused("ood")


def test_where_nothing_serves_the_plugins_that_could_be_named_are_told(distribute: Distribute) -> None:
    with pytest.raises(PluginError, match=r"BertModel.*; name a plugin that does in --plugins$"):
        model_for(Plugins.load(), ["FooForCausalLM"])
    distribute("odd-llama", {"odd": "odd_manifest"}, odd_manifest="")
    with pytest.raises(PluginError, match=r"in --plugins; installed and not named: odd$"):
        model_for(Plugins.load(), ["FooForCausalLM"])
    with pytest.raises(PluginError, match=r"'awq'.*in --plugins; installed and not named: odd$"):
        quantization_for(Plugins.load(), "awq")


MISMADE = """
from engine.plugin import hookimpl

@hookimpl
def register_policies(register):
    register("mine", "odd_code:Policy")
    register("lost", "odd_code:Policies")

@hookimpl
def register_models(register):
    register("mine", "odd_code:Policy", architectures=("Odd",))

@hookimpl
def register_attention(register):
    register("mine", "odd_code:Attention", devices=("cpu",))

@hookimpl
def register_parsers(register):
    register("mine", "odd_code:Policy", kind="tool")
    register("thoughts", "odd_code:Policy", kind="reasoning")

@hookimpl
def register_media(register):
    register("mine", "odd_code:Policy", architectures=("Odd",))
"""
CODE = """
from engine.plugin.layers import PagedAttention

class Policy:
    pass

class Attention(PagedAttention):
    def prepare(self, batch):
        return None
"""


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("policies", "lost", "cannot be imported: AttributeError: module 'odd_code' has no attribute 'Policies'"),
        ("models", "mine", "odd_code:Policy is no subclass of Model, and must be one"),
        ("attention", "mine", "odd_code:Attention lacks attend, which AttentionBackend has; docs/plugins.md says more"),
        ("parsers", "mine", "odd_code:Policy is no subclass of ToolParser, and must be one"),
        ("parsers", "thoughts", "odd_code:Policy is no subclass of ReasoningParser, and must be one"),
        ("media", "mine", "lacks choose_frames, prepare, placed, which MediaProcessor has; docs/plugins.md says more"),
    ],
)
def test_code_that_is_not_as_its_kind_names_the_plugin(distribute: Distribute, kind: str, name: str, said: str) -> None:
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=MISMADE, odd_code=CODE)
    with pytest.raises(PluginError) as caught:
        Plugins.load(["odd"]).code(kind, name)
    assert str(caught.value).startswith(f"{name!r} of odd 1.2: odd_code:")
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("Checkpoint = type('Checkpoint', (), {})", "lacks open, name, config, text, tensors, which Checkpoint has"),
        ("Checkpoint = type('Checkpoint', (), {'open': lambda _: 1})", "lacks open, name, config, text, tensors"),
        ("Checkpoint = type('Checkpoint', (), {'open': lambda _: None})", "does not exist"),
    ],
)
def test_what_a_checkpoint_format_opens_is_checked(distribute: Distribute, code: str, says: str) -> None:
    """And not the class, which may hand on what another opens (as the toy's objects, which get their methods late)."""
    manifest = """
    from engine.plugin import hookimpl

    @hookimpl
    def register_checkpoints(register):
        register("mine", "odd_code:Checkpoint")
    """
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=manifest, odd_code=code)
    with pytest.raises(EngineError, match=says):
        open_checkpoint(Plugins.load(["odd"]), "nowhere/at/all")


def test_a_policy_without_its_methods_does_not_start(distribute: Distribute) -> None:
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=MISMADE, odd_code=CODE)
    with pytest.raises(PluginError) as caught:
        make_policy(Plugins.load(["odd"]), "mine")
    assert (
        str(caught.value)
        == "'mine' of odd 1.2: odd_code:Policy lacks order, needs_match, which Policy has; docs/plugins.md says more"
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("Pool", ""),
        ("Empty", "lacks memory, which Pool has; docs/plugins.md says more"),
        ("make", "missing a required argument: 'pages'"),
    ],
)
def test_a_pool_is_made_of_what_it_is_told(distribute: Distribute, target: str, says: str) -> None:
    """Whatever its target is: what is in C need not say what it takes, and a partial call has no name."""
    manifest = f"""
    from engine.plugin import hookimpl

    @hookimpl
    def register_tiers(register):
        register("mine", "odd_code:{target}", kind="pool")
    """
    code = """
    from functools import partial

    class Empty(dict):
        pass

    class Pool(dict):
        memory = None

    make = partial(lambda pages, **about: None)
    """
    distribute("odd", {"odd": "odd_manifest"}, odd_manifest=manifest, odd_code=code)
    plugins = Plugins.load(["odd"])
    if not says:
        assert make_tier(plugins, "pool", "--kv-host", capacity_bytes=1) == {"capacity_bytes": 1}
        return
    with pytest.raises(PluginError) as caught:
        make_tier(plugins, "pool", "--kv-host", capacity_bytes=1)
    assert "'mine' of odd 1.2: odd_code:" in str(caught.value) and str(caught.value).endswith(says)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("grammars", "routes", "commands")])
def test_the_built_in_code_is_as_its_kind_must_be(kind: str) -> None:
    plugins = Plugins.load()
    for name in plugins.entries(kind):
        assert plugins.code(kind, name)


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
    assert model_for(Plugins.load(), ["LlamaForCausalLM"]).name == "llama"
    with pytest.raises(PluginError, match=r"FooForCausalLM.*LlamaForCausalLM"):
        model_for(Plugins.load(), ["FooForCausalLM"])


def test_a_named_model_wins(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS)
    plugins = Plugins.load(["fast"])
    assert model_for(plugins, ["LlamaForCausalLM"]).name == "llama-fast"
    assert model_for(plugins, ["MistralForCausalLM"]).name == "llama"  # the package has nothing for it
    assert model_for(Plugins.load(["fast", "other"]), ["OtherForCausalLM"]).name == "other"
    with pytest.raises(PluginError, match="llama and llama-fast"):
        model_for(Plugins.load(["fast", "llama"]), ["LlamaForCausalLM"])


def test_a_model_named_in_vain_is_refused() -> None:
    with pytest.raises(PluginError, match=r"llama serves LlamaForCausalLM.*FooForCausalLM"):
        model_for(Plugins.load(["llama"]), ["FooForCausalLM"])


def test_attention_is_chosen_by_preference_unless_named(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS.replace("-5", "99").replace('"quick"', '"quickest"'))
    entry, reason = attention_for(Plugins.load(), "cpu")
    assert entry.name == "cpu"
    assert "before torch" in reason
    assert [other.name for other in attention_after(Plugins.load(), entry, "cpu")] == ["torch"]
    named, _ = attention_for(Plugins.load(["cpu"]), "cpu")
    assert attention_after(Plugins.load(["cpu"]), named, "cpu") == []
    entry, reason = attention_for(Plugins.load(["fast"]), "cuda")
    assert (entry.name, reason) == ("quickest", "named in --plugins")
    with pytest.raises(PluginError, match="'quickest', which runs on cuda, not on cpu"):
        attention_for(Plugins.load(["fast", "quickest"]), "cpu")
    with pytest.raises(PluginError, match=r"'tpu'.*torch"):
        attention_for(Plugins.load(), "tpu")


def test_a_named_attention_wins_over_a_preferred_one(distribute: Distribute) -> None:
    distribute("fast", {"fast": "fast"}, fast=MODELS)  # preference -5: below torch
    assert attention_for(Plugins.load(["fast"]), "cuda")[0].name == "quick"


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
        found = quantization_for(Plugins.load(named), method)
        assert found is not None
        return f"{found[0].name}: {found[1]}"

    assert quantization_for(Plugins.load(), None) is None
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
    entry, reason = attention_for(plugins, "cuda", latent=True)
    assert entry.name == "flashinfer" and "Latent" in entry.target and "before torch (0), triton (20)" in reason
    assert [other.name for other in attention_after(plugins, entry, "cuda", latent=True)] == ["triton", "torch"]
    assert attention_for(plugins, "cpu", latent=True)[0].name == "torch"
    for latent in (False, True):
        entry, reason = attention_for(Plugins.load(["triton"]), "cuda", latent)
        assert (entry.name, reason) == ("triton", "named in --plugins") and ("Latent" in entry.target) is latent
        with pytest.raises(PluginError, match="backend 'triton', which runs on cuda, not on cpu"):
            attention_for(Plugins.load(["triton"]), "cpu", latent)
    with pytest.raises(PluginError, match="names cpu, which is no latent attention backend; there is torch, triton"):
        attention_for(Plugins.load(["cpu"]), "cpu", latent=True)
    distribute("fast", {"fast": "fast"}, fast=MODELS)  # has none: the choice is ours
    assert attention_for(Plugins.load(["fast"]), "cuda", latent=True)[0].name == "flashinfer"


def test_policies() -> None:
    plugins = Plugins.load()
    assert make_policy(plugins, "auto").order(["a", "b"], [0, 9]) == [0, 1]
    assert make_policy(Plugins.load(["lpm"])).order(["a", "b"], [0, 9]) == [1, 0]
    with pytest.raises(PluginError, match="unknown policy 'fcsf'; did you mean 'fcfs'"):
        make_policy(plugins, "fcsf")
    with pytest.raises(PluginError, match="fcfs and lpm; choose one with --policy"):
        make_policy(Plugins.load(["lpm", "fcfs"]))


# ── the number of the API, and files ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("API = 2", ["plugin API 2", "has API 1", "upgrade the engine", "version of the plugin for this API"]),
        ("from engine.plugin import not_there_yet\nAPI = 3", ["plugin API 3", "has API 1"]),
        ("API = '1'", ["'1'", "a number such as 1"]),
        ("API = 0", ["its API is 0"]),
        ("API = True", ["its API is True"]),
    ],
)
def test_a_manifest_for_another_api_is_refused_with_both_numbers(
    distribute: Distribute, source: str, words: list[str]
) -> None:
    distribute("late", {"late": "late_manifest"}, late_manifest=source)
    said = refused("late")
    assert [word for word in ["'late' of late 1.2", *words] if word not in said] == []


def test_a_manifest_without_a_number_is_of_the_first_api(distribute: Distribute) -> None:
    distribute("one", {"one": "one_manifest"}, one_manifest=POLICY.format(name="backwards", module="one_manifest"))
    assert "backwards" in Plugins.load(["one"]).entries("policies")


def test_built_in_manifests_state_their_api() -> None:
    for folder in (Path(__file__).parents[3] / "plugins").glob("*/__init__.py"):
        assert "\nAPI = 1\n" in folder.read_text(), folder
    assert "\nAPI = 1\n" in (EXAMPLE / "engine_shortest" / "__init__.py").read_text()


def test_a_file_is_a_plugin_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "whole_plugin", raising=False)
    path = tmp_path / "whole_plugin.py"
    path.write_text(POLICY.format(name="backwards", module="whole_plugin"))
    for _ in range(2):  # the front and the core may be one process
        plugins = Plugins.load([str(path)])
        assert make_policy(plugins).order([1, 2], [0, 0]) == [1, 0]
    (row,) = (row for row in plugins.listing() if row.name == "backwards")
    assert (row.distribution, row.version, row.state) == (str(path), "", "named")
    monkeypatch.chdir(tmp_path)
    assert make_policy(Plugins.load(["./whole_plugin.py"])).order([1, 2], [0, 0]) == [1, 0]


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("none.py", None, ["none.py: there is no such file"]),
        ("json.py", "", ["another module 'json'", "rename the file"]),
        ("two-words.py", "", ["name the file like one"]),
        ("ruined.py", "1 / 0", ["ruined.py fails to load: ZeroDivisionError"]),
        ("newer.py", "API = 2\n1 / 0", ["newer.py is written for plugin API 2, and this engine has API 1"]),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(tmp_path: Path, name: str, source: str | None, words: list[str]) -> None:
    path = tmp_path / name
    if source is not None:
        path.write_text(source)
    said = refused(str(path))
    assert [word for word in words if word not in said] == []
    assert path.stem not in sys.modules or path.stem == "json"


# ── opening a checkpoint ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def toys(distribute: Distribute) -> Plugins:
    distribute("toys", {"toys": "toy_format"}, toy_format=FORMAT)
    return Plugins.load(["toys"])


def test_an_embedded_name_goes_to_its_format(toys: Plugins) -> None:
    assert open_checkpoint(toys, "toy-1b").model == "toy-1b"  # type: ignore[attr-defined]


def test_a_path_goes_to_the_format_that_knows_it(toys: Plugins, tmp_path: Path) -> None:
    path = str(tmp_path / "a.toy")
    assert open_checkpoint(toys, path).model == path  # type: ignore[attr-defined]


def test_a_hub_id_is_fetched(toys: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(model: str, **kwargs: list[str]) -> str:
        calls.append((model, kwargs))
        return "/cache/toyhub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint(toys, "org/model").model == "/cache/toyhub"  # type: ignore[attr-defined]
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
        open_checkpoint(Plugins.load(), model)
    for words in (model, ".gguf file", "Hugging Face id"):
        assert words in str(caught.value)


@pytest.mark.parametrize("model", ["/no/model.gguf", "no/model.gguf"])
def test_a_missing_gguf_file_is_no_hub_id(model: str) -> None:
    with pytest.raises(ConfigError, match=f"no file {model}"):
        open_checkpoint(Plugins.load(), model)


def test_a_near_miss_of_an_embedded_name_is_told(toys: Plugins) -> None:
    with pytest.raises(ConfigError, match="did you mean 'toy-1b'"):
        open_checkpoint(toys, "toy-1c")


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
    policy = make_policy(Plugins.load(list(points)))
    waiting = [
        Waiting(arrival=arrival, priority=0, prompt_len=length, length=length, max_new=9)
        for arrival, length in enumerate((10, 4, 7))
    ]
    assert policy.order(waiting, [0, 0, 0]) == [1, 2, 0]
    assert policy.order(waiting, [9, 0, 0]) == [0, 1, 2]


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
from engine.sched.policies import make_policy
from engine.worker.choices import attention_for, model_for
plugins = Plugins.load()
model_for(plugins, ["LlamaForCausalLM"]), attention_for(plugins, "cpu"), make_policy(plugins)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_grammar_engines_are_asked_in_order_and_a_named_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"llguidance", "xgrammar"}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(engines, "version", version)
    assert [entry.name for entry in grammar_engines(Plugins.load())] == ["llguidance", "xgrammar"]
    assert [entry.name for entry in grammar_engines(Plugins.load(("xgrammar",)))] == ["xgrammar"]
    installed.remove("xgrammar")
    assert [entry.name for entry in grammar_engines(Plugins.load())] == ["llguidance"]
    with pytest.raises(PluginError, match="not installed; pip install xgrammar"):
        grammar_engines(Plugins.load(("xgrammar",)))
