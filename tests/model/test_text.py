"""The real SmolLM2's text against transformers: token ids, round trips and the chat template."""

from datetime import datetime

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from engine.conversation.parts import read_messages
from engine.errors import ConfigError, RequestError
from engine.plugin.specs import TextSpec
from engine.text.tokenizer import Text
from engine_plugins.checkpoints.gguf.checkpoint import EMBEDDED, GGUFCheckpoint, embedded_path

PROMPTS = [
    "The capital of France is",
    "a b c d e f g h",
    "Hello, world! I've 1234 apples; it's  two   spaces\n\n\tand tabs.",
    "def f(x):\n    return x ** 2  # größer, naïve, Ελληνικά, 漢字かな, العربية, 👩‍👩‍👧 😀",
    "½ ² Ⅷ ٣ 3.14e-10 0x1F",
    "<|im_start|>user\nhi<|im_end|>\n",
    " leading and trailing \r\n ",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2 <b>'&\"</b>"},
        {"role": "user", "content": "\n3 "},
    ],
]


@pytest.fixture(scope="module")
def text() -> Text:
    checkpoint = GGUFCheckpoint.open("smollm2-135m")
    assert checkpoint is not None
    return Text(checkpoint.text())


@pytest.fixture(scope="module")
def peer():
    """transformers' own reading of the same file.

    It cuts every GGUF's text as GPT-2 does; SmolLM2's tokenizer.json sets digits apart first."""
    path = embedded_path("smollm2-135m", *EMBEDDED["smollm2-135m"])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def empty_text(template: str | None, bos_token: str = "", eos_token: str = "") -> Text:
    spec = TextSpec(
        Tokenizer(models.BPE()), eos_ids=(), bos_token=bos_token, eos_token=eos_token, chat_template=template
    )
    return Text(spec)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(text, peer, prompt):
    assert text.encode(prompt) == peer(prompt).input_ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_round_trip(text, prompt):
    special = prompt.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert text.decode(text.encode(prompt)) == special


def test_known_ids(text):
    assert text.encode("1, 2, 3, 4, 5, 6, 7,") == [id for digit in range(33, 40) for id in (216, digit, 28)][1:]
    counted = [216, 40, 28, 216, 41, 28, 216, 33, 32, 28, 216, 33, 33, 28]
    assert text.decode(counted) == " 8, 9, 10, 11,"
    reply = text.reply((" 10",))
    assert reply.push(counted) + reply.flush() == " 8, 9,"
    assert (reply.matched, reply.kept) == (" 10", 6)


def test_vocabulary_and_special_tokens(text):
    spec = text.spec
    assert text.vocab_size == 49152
    assert (spec.eos_ids, spec.bos_id, spec.add_bos) == ((2,), 1, False)
    assert (spec.bos_token, spec.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert text.encode("<|im_end|>") == [2]
    assert text.decode([1, 40, 2]) == "8"


@pytest.mark.parametrize("messages", CHATS)
def test_chat_is_rendered_as_transformers_renders_it(text, peer, messages):
    ours = text.render_chat(read_messages(messages))
    assert ours == peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.encode_chat(read_messages(messages)) == peer(ours, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m | tojson }}\n  {% endif %}\n"
        "{% endfor %}{{ eos_token }}{{ tools is none }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] | trim }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }} {{ strftime_now('%Y') }}",
    ],
)
def test_template_language_is_that_of_transformers(peer, template):
    ours = empty_text(template, peer.bos_token, peer.eos_token).render_chat(read_messages(CHATS[2]))
    expected = peer.apply_chat_template(CHATS[2], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert ours == expected
    assert ours != ""


def test_content_parts_are_joined(text):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    assert text.render_chat(read_messages([{"role": "user", "content": parts}])) == text.render_chat(
        read_messages([{"role": "user", "content": "What is 2 + 2?"}])
    )


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([*CHATS[0], {"role": "robot", "content": "b"}], r"messages\[1\] has role 'robot'; .*user"),
        ([{"role": ["user"], "content": "a"}], r"has role \['user'\]"),
        ([{"role": "user"}], "has content None"),
        ([{"role": "user", "content": 3}], "has content 3"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "nor an image_url or a video_url with its url",
        ),
        ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
    ],
)
def test_bad_messages_are_refused(text, messages, says):
    with pytest.raises(RequestError, match=says) as refusal:
        text.encode_chat(read_messages(messages))
    assert (refusal.value.param, refusal.value.status) == ("messages", 400)


def test_the_templates_own_refusal_reaches_the_client():
    text = empty_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate") as refusal:
        text.render_chat(read_messages(CHATS[0]))
    assert refusal.value.param == "messages"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1]() }}"])
def test_a_failing_or_hostile_template_is_a_refusal(template):
    with pytest.raises(RequestError, match="chat template refuses"):
        empty_text(template).render_chat(read_messages(CHATS[0]))


def test_a_malformed_template_stops_the_start():
    with pytest.raises(ConfigError, match="malformed at line 2"):
        empty_text("\n{% if %}")


def test_a_model_without_template_says_what_to_do():
    with pytest.raises(RequestError, match="/v1/completions"):
        empty_text(None).encode_chat(read_messages(CHATS[0]))


def test_a_template_given_takes_the_place_of_the_models(text):
    assert Text(text.spec, chat_template="{{ messages[0].content }}").render_chat(read_messages(CHATS[0])) == "Hi"


def test_first_token_is_added_where_the_model_asks_for_it(text):
    spec = TextSpec(text.spec.tokenizer, eos_ids=(2,), bos_id=1, add_bos=True)
    assert Text(spec).encode("8") == [1, 40]
    assert Text(spec).encode("<|im_start|>8") == [1, 40]


def test_half_a_character_in_a_prompt_is_refused(text):
    with pytest.raises(RequestError, match="half of a surrogate pair") as refusal:
        text.encode("a\udc00")
    assert refusal.value.param == "prompt"


def test_the_clock_of_templates():
    assert empty_text("{{ strftime_now('%Y') }}").render_chat(read_messages(CHATS[0])) == str(datetime.now().year)
