"""Fetch a checkpoint from the Hugging Face hub into its cache. What a checkpoint is, the formats know."""

import re

from engine.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer*")
UNWANTED = ("*/*.safetensors", "*/tokenizer*", "consolidated*", "adapter*")  # of other formats, or a second copy


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as organization/name."""
    return HUB_ID.fullmatch(model) is not None and not model.endswith((".gguf", ".safetensors"))


def download(model: str) -> str:
    """The local folder of `model`, downloaded if the cache lacks it. Raises ConfigError with the remedy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return str(snapshot_download(model, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except GatedRepoError as error:
        remedy = f"accept its terms at https://huggingface.co/{model}, then set HF_TOKEN or run `hf auth login`"
        raise ConfigError(f"{model} is gated on the Hugging Face hub; {remedy}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = "check the spelling; for a private one set HF_TOKEN or run `hf auth login`"
        raise ConfigError(f"{model} is neither a path here nor a model on the Hugging Face hub; {remedy}") from error
    except LocalEntryNotFoundError as error:
        remedy = "connect, or copy the model here and pass its directory, or unset HF_HUB_OFFLINE if it is set"
        raise ConfigError(
            f"{model} is not in the local cache and the Hugging Face hub cannot be reached; {remedy}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{model} could not be fetched from the Hugging Face hub: {error}") from error
