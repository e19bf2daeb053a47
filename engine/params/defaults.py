"""The sampling values that a model states in its generation_config.json."""

from collections.abc import Mapping
from typing import Any

from engine.errors import RequestError, shown
from engine.params.fields import INT32_MAX, Kind, Whole
from engine.params.sampling import FIELDS, SamplingDefaults


def model_defaults(generation: Mapping[str, Any]) -> tuple[SamplingDefaults, list[str]]:
    """The defaults that a generation_config.json states, and a sentence for each value that is out of bounds.

    In place of such a value stands the API's own default. `do_sample: false` means temperature 0."""
    kinds: dict[str, Kind] = {field.name: field.kind for field in FIELDS}
    kinds["max_new_tokens"] = Whole(1, INT32_MAX, "leave it out for the model's length")
    stated: dict[str, Any] = {}
    wrong = []
    for name in SamplingDefaults.__struct_fields__:
        if (value := generation.get(name)) is None:
            continue
        try:
            kinds[name].check(name, value)
        except RequestError as error:
            wrong.append(error.message)
        else:
            stated[name] = value
    if (samples := generation.get("do_sample")) not in (None, True, False):
        wrong.append(f"do_sample is {shown(samples)}; it must be true or false (false is temperature 0)")
    elif samples is False:
        stated["temperature"] = 0.0
    return SamplingDefaults(**stated), wrong
