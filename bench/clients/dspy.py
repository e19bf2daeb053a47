"""a call of the model, Predict and ChainOfThought in JSON of their signature"""

import os

import dspy


class Ours(dspy.LM):
    """DSPy sends a format only to models that it knows to take one."""

    supports_response_schema = True
    supported_params = frozenset({"response_format", "tools", "tool_choice"})


url = os.environ["ENGINE_URL"] + "/v1"
lm = Ours(f"openai/{os.environ['ENGINE_MODEL']}", api_base=url, api_key="none", max_tokens=400, cache=False)
assert lm("Say hello.")[0]
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
assert dspy.Predict("question -> sure: bool")(question="Is the sky blue?").sure in (True, False)
thought = dspy.ChainOfThought("question -> sure: bool")(question="Is the sky blue?")
assert thought.reasoning and thought.sure in (True, False)
