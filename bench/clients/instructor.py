"""a model from a forced call, from a JSON schema, and streamed in parts"""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

URL, MODEL = os.environ["ENGINE_URL"], os.environ["ENGINE_MODEL"]


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


said = [{"role": "user", "content": "Ann is 30 years old."}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=URL + "/v1", api_key="none"), mode=mode)
    ask = {"model": MODEL, "messages": said, "max_tokens": 80, "max_retries": 0}
    assert client.chat.completions.create(response_model=Person, **ask).age >= 0
    *_, last = client.chat.completions.create_partial(response_model=Person, **ask)
    assert last.name
