"""Contract checks that the built-in plugins pass, for authors to run.

    @pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
    def test_attention(case):
        check_attention(MyBackend, case)

    @pytest.mark.parametrize("case", LATENT_CASES, ids=str)
    def test_latent_attention(case):
        check_latent_attention(MyLatentBackend, case)

    @pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
    def test_model(scenario):
        check_model(MyModel, config, tensors, reference, scenario)

    @pytest.mark.parametrize("case", GRAMMAR_CASES, ids=str)
    def test_grammar(case):
        check_grammar(MyEngine, case)

    def test_parser():
        check_tool_parser(MyParser)  # or check_reasoning_parser; check_any_split for replies of your own

    def test_store(tmp_path):
        check_store(MyStore, str(tmp_path), lasting=True)  # or check_pool

    def test_processor():
        check_processor(MyProcessor, config, processor_config, image=IMAGE_ID, encode=encode)

    def test_quantization():
        check_scheme(MyScheme(None))

Each raises AssertionError with the numbers. Imports torch. Left out: speed.
"""

from engine.testing.attention import (
    ATTENTION_CASES,
    LATENT_CASES,
    AttentionCase,
    LatentCase,
    check_attention,
    check_latent_attention,
    latent_reference,
    latent_step,
)
from engine.testing.grammars import (
    GRAMMAR_CASES,
    INVALID,
    GrammarCase,
    check_grammar,
    check_invalid,
    check_together,
    check_whitespace,
)
from engine.testing.models import MODEL_SCENARIOS, ModelHarness, check_model
from engine.testing.parsers import check_any_split, check_reasoning_parser, check_tool_parser
from engine.testing.pools import check_pool
from engine.testing.processors import check_processor
from engine.testing.schemes import check_scheme
from engine.testing.stores import check_store

__all__ = [
    "ATTENTION_CASES",
    "GRAMMAR_CASES",
    "INVALID",
    "LATENT_CASES",
    "MODEL_SCENARIOS",
    "AttentionCase",
    "GrammarCase",
    "LatentCase",
    "ModelHarness",
    "check_any_split",
    "check_attention",
    "check_grammar",
    "check_invalid",
    "check_latent_attention",
    "check_model",
    "check_pool",
    "check_processor",
    "check_reasoning_parser",
    "check_scheme",
    "check_store",
    "check_together",
    "check_tool_parser",
    "check_whitespace",
    "latent_reference",
    "latent_step",
]
