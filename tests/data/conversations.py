"""Conversations for the tests of tokens and masks: made from a seed, with everything that has bitten a chat
template.
"""

import random

WORDS = (
    "the answer is forty two because rivers run to the sea and 3.14 rounds Down x_1 == y[0] "
    "naïve façade Straße ΑΒΓ Привет "
    "日本語 中文字符 한국어 العربية हिन्दी 🤗 👩‍👩‍👧‍👦 é ½ … — "
    "\u200b \u00a0 \u3000 1,234 don't WE'LL I'm /tmp/a.txt {json} "
    "[INST] ### Response: "
    "assistant user <b> </tool_response> <tool_response> \\n %s {{x}} {% if %}"
).split(" ")
GAPS = (" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", " \n ")


def words(rng: random.Random, low: int, high: int) -> str:
    text = ""
    for _ in range(rng.randint(low, high)):
        text += rng.choice(WORDS) + rng.choice(GAPS)
    return text.strip() or "x"


def padded(rng: random.Random, text: str) -> str:
    """Blanks around one text in three: templates trim, or do not."""
    if rng.random() < 0.67:
        return text
    return rng.choice(("", " ", "\n", "  \n\t", "\u00a0 ")) + text + rng.choice(("", " ", "\n", " \n\n ", "\u3000"))


def arguments(rng: random.Random) -> dict:
    values = (
        1,
        -2.5,
        True,
        None,
        "",
        words(rng, 1, 4),
        [1, "two"],
        {"deep": {"er": words(rng, 1, 2)}},
        '"quoted" \\ back',
    )
    return {f"arg{i} {rng.choice(WORDS)}": rng.choice(values) for i in range(rng.randint(0, 3))}


def schema(rng: random.Random) -> dict:
    properties = {name: {"type": "string", "description": words(rng, 1, 6)} for name in ("place", "unité", "n")}
    parameters = {"type": "object", "properties": properties, "required": ["place"]}
    return {
        "type": "function",
        "function": {"name": "find_" + rng.choice("abc"), "description": words(rng, 2, 8), "parameters": parameters},
    }


def answer(rng: random.Random, thinking: bool) -> dict:
    text = padded(rng, words(rng, 1, 15))
    if not thinking or rng.random() < 0.3:
        return {"role": "assistant", "content": text}
    thought = words(rng, 1, 10)
    if rng.random() < 0.4:
        return {
            "role": "assistant",
            "content": text,
            rng.choice(("reasoning_content", "thinking", "reasoning")): padded(rng, thought),
        }
    gap = rng.choice(("\n", "", "\n\n"))
    return {"role": "assistant", "content": f"<think>{gap}{thought}{gap}</think>{gap}{text}"}


def tool_turns(rng: random.Random) -> list[dict]:
    calls = [
        {
            "id": f"c{i}",
            "type": "function",
            "function": {"name": "find_" + rng.choice("abc"), "arguments": arguments(rng)},
        }
        for i in range(rng.choice((1, 1, 1, 2)))
    ]
    content = rng.choice((None, "", words(rng, 1, 5)))
    results = [
        {"role": "tool", "tool_call_id": f"c{i}", "content": padded(rng, words(rng, 1, 8))} for i in range(len(calls))
    ]
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


def conversation(seed: int) -> tuple[list[dict], list[dict] | None]:
    """Messages and tools; every third has tools, every third thinks, half have a system message, a few are odd."""
    rng = random.Random(seed)
    tools = [schema(rng) for _ in range(rng.randint(1, 3))] if seed % 3 == 0 else None
    messages = [{"role": "system", "content": padded(rng, words(rng, 1, 12))}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": padded(rng, words(rng, 1, 15))})
        if tools and rng.random() < 0.7:
            messages += tool_turns(rng)
        messages.append(answer(rng, thinking=seed % 3 == 1))
    if seed % 17 == 0:
        messages.append({"role": "user", "content": "and then?"})  # ends with a question
    if seed % 23 == 0:
        messages.insert(0, {"role": "assistant", "content": "Hi!"})  # some templates refuse it
    return messages, tools
