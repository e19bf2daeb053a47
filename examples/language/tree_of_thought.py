"""Tree of thought: three plans, two ways to go on from each, and the model's own choice among them.

python examples/language/tree_of_thought.py
"""

from engine import Engine
from engine.lang import State, function, gen, select

EXAMPLES = """Question: A shop sells pens at 2 euros. What do 5 pens cost?
Plan: multiply the price by the number of pens.
Solution: 5 times 2 is 10. The answer is 10 euros.
Is it right? yes
Question: Ann has 7 apples and eats 2. How many are left?
Plan: take the number that was eaten away from what she had.
Solution: 7 minus 2 is 5. The answer is 5 apples.
Is it right? yes
"""
ANSWERS = [" yes", " no"]
QUESTION = "Question: A train has 4 cars with 20 seats each. How many seats does it have?\n"


@function
async def solve(s: State, question: str, plans: int = 3, ways: int = 2) -> None:
    s += EXAMPLES + question
    leaves = []
    planned = s.fork(plans)
    planned += [f"Plan {index + 1}:" + gen("plan", max_tokens=16, stop="\n", seed=index) for index in range(plans)]
    for plan in planned:
        solved = plan.fork(ways)
        solved += [
            f"\nSolution {index + 1}:" + gen("solution", max_tokens=24, stop="\n", seed=index) for index in range(ways)
        ]
        solved += "\nIs it right?" + select("right", ANSWERS)
        leaves += list(solved)
    found = []
    for leaf in leaves:
        right = await leaf.get("right")
        yes = leaf.get_meta_info("right").scores[ANSWERS.index(" yes")].mean
        found.append((yes, right, await leaf.get("plan"), await leaf.get("solution")))
    s.set_var("found", sorted(found, reverse=True))


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        s = solve.run(QUESTION, backend=engine, temperature=0.7)
        print(f"{'yes':>6}  plan and solution")
        for score, _, plan, solution in s["found"]:
            print(f"{score:6.2f}  {plan.strip()} -> {solution.strip()}")
        usage = s.usage
        saved = usage.cached_tokens / usage.prompt_tokens
        print(f"{usage.calls} calls, {usage.prompt_tokens} tokens in prompts, {saved:.0%} of them were cached")


if __name__ == "__main__":
    main()
