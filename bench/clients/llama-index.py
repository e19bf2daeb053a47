"""complete, chat, streamed chat, structured output"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

llm = OpenAILike(
    api_base=os.environ["ENGINE_URL"] + "/v1",
    api_key="none",
    model=os.environ["ENGINE_MODEL"],
    is_chat_model=True,
    is_function_calling_model=True,
    max_tokens=80,
)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


said = [ChatMessage(role="user", content="Say hello.")]
assert llm.complete("Say hello.").text
assert llm.chat(said).message.content
assert "".join(part.delta or "" for part in llm.stream_chat(said))
assert llm.as_structured_llm(Person).complete("Ann is 30 years old.").raw.age >= 0
