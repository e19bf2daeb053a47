"""ReAct: the model thinks, writes what a tool shall compute, reads what that returned, and answers.

python examples/language/react.py
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

from engine import Engine
from engine.lang import State, function, gen, select

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
QUESTIONS = ["A box has 12 pens. How many pens have 34 boxes?", "Ann has 1001 euros and spends 7. What is left?"]
EXAMPLES = """Question: A bus has 40 seats. How many seats have 3 buses?
Thought: I multiply the seats by the buses.
Action: calculate 40 * 3
Observation: 120
Action: answer
Answer: 120 seats.

Question: Tom has 50 euros and spends 8. What is left?
Thought: I take away what he spends.
Action: calculate 50 - 8
Observation: 42
Action: answer
Answer: 42 euros.

"""
STEPS = 3


def calculate(expression: str) -> str:
    """Compute an expression of numbers, such as 2 * 3 + 4."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left, kind, right) if type(kind) in OPERATORS:
                return float(OPERATORS[type(kind)](value(left), value(right)))
        raise ValueError("only numbers, + - * and / are understood")

    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):g}"
    except (SyntaxError, ValueError, ZeroDivisionError) as error:
        return f"Error: {error}"


@function
async def solve(s: State, question: str) -> None:
    s += EXAMPLES + f"Question: {question}\nThought:" + gen("thought", max_tokens=20, stop="\n")
    observed = []
    for number in range(STEPS):
        s += f"\nAction: {'calculate' if not number else ''}"
        if number:
            s += select(f"tool {number}", ["calculate", "answer"])
            if await s.get(f"tool {number}") == "answer":
                break
        s += gen(f"sum {number}", regex=r" [0-9]{1,5} [-+*/] [0-9]{1,5}", max_tokens=16)
        expression = (await s.get(f"sum {number}")).strip()
        result = calculate(expression)
        observed.append(f"{expression} = {result}")
        s += f"\nObservation: {result}"
    s += "\nAnswer:" + gen("answer", max_tokens=12, stop="\n")
    s.set_var("observed", observed)


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        states = solve.run_batch([{"question": question} for question in QUESTIONS], backend=engine, temperature=0)
        print(f"{'prompt':>8}{'cached':>8}  what was computed, and the answer")
        for question, s in zip(QUESTIONS, states, strict=True):
            print(f"{s.usage.prompt_tokens:8}{s.usage.cached_tokens:8}  {question}")
            print(f"{'':16}  {'; '.join(s['observed'])}: {s['answer'].strip()}")


if __name__ == "__main__":
    main()
