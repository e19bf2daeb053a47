"""The checkpoint of the echo model: a byte-level tokenizer and no tensors, made up on the spot."""

from collections.abc import Iterator
from typing import Any

from engine.plugin import LazyTensor, TextSpec

END = 256  # the one token that is not a byte


class EchoCheckpoint:
    """Opens the name "echo", and nothing else."""

    @classmethod
    def open(cls, model: str) -> "EchoCheckpoint | None":
        return cls() if model == "echo" else None

    def name(self) -> str:
        return "echo"

    def config(self) -> dict[str, Any]:
        return {"architectures": ["EchoForTests"], "max_position_embeddings": 4096, "vocab_size": END + 1}

    def text(self) -> TextSpec:
        """Token b is the byte b. A chat is its messages' contents, one a line."""
        return TextSpec(
            tokenizer=_byte_tokenizer(),
            eos_ids=(END,),
            eos_token="<end>",
            chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        )

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        return iter(())


def _byte_tokenizer() -> Any:
    """BPE without merges over the byte-level alphabet, numbered by byte value."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {_symbol(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == END
    return tokenizer


def _symbol(byte: int) -> str:
    """The printable character by which byte-level BPE (GPT-2) writes a byte: itself, or one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))
