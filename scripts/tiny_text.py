"""The documents that the embedded tiny Llama is pre-trained on: ledgers, letters, chronicles, rolls, copybooks, talk.

`document(seed, index)` is one of them, a pure function of its arguments. Later parts of a document restate facts of
earlier parts in other words, so that a language model of this text has to look back and copy, which is what fine-tuning
builds on. Names and sales are tiny_world.py's. Left out: any text that this project did not make.
"""

import random
import string
from collections.abc import Callable

from tiny_world import (
    COINS,
    DAYS,
    GOODS,
    SALE_FORMS,
    UNITS,
    WORLDS,
    Sale,
    World,
    day,
    names,
    people,
    sales,
    tell,
    told_twice,
)

TRADES = (
    "abbot baker brewer carter cooper dyer fletcher fuller glover mason miller potter reeve sexton smith tanner "
    "thatcher weaver"
).split()
WORKS = "barn bridge chapel ferry gate granary mill quay tower wall well".split()
WEATHER = (
    "a hard frost",
    "a wet spring",
    "a long drought",
    "a great storm",
    "heavy snow",
    "a mild winter",
    "a great flood",
    "a dry summer",
)
ROLES = "seller buyer witness goods town price".split()
WORDS = (*GOODS, *UNITS, *COINS, *TRADES, *WORKS, *DAYS, *ROLES)  # of copybooks
SIGNS = string.ascii_letters + string.digits + string.punctuation  # of copybooks, too


def ledger(rng: random.Random, world: World) -> str:
    clerk, [town] = people(rng, world, 1)[0], names(rng, world, 1)
    twice = [told_twice(rng, sale, world) for sale in sales(rng, world, rng.randint(1, 3))]
    again = [second for _, second in twice]
    rng.shuffle(again)
    head = f"The ledger of {town}, kept by {clerk} in the year {rng.randint(1100, 1799)}."
    lines = [first for first, _ in twice] + [rng.choice(("In other words:", "To say it again:", "That is:"))] + again
    return "\n".join([head, *lines, rng.choice((f"So wrote {clerk} at {town}.", f"Here ends the ledger of {town}."))])


def letter(rng: random.Random, world: World) -> str:
    writer, reader, friend, other = people(rng, world, 4)
    town, far = names(rng, world, 2)
    goods, weather, trade = rng.sample(world.goods, 2), rng.choice(WEATHER), rng.choice(TRADES)
    body = [
        f"I write to you from {town}, where we have had {weather} since {day(rng)}.",
        f"{friend}, the {trade}, is well, and asks for {goods[0]} and {goods[1]} from {far}.",
        f"Please tell {other} that the road from {town} to {far} is open.",
        f"I have lent {friend} {rng.choice(world.numbers)} {rng.choice(COINS)} for a new {rng.choice(WORKS)}.",
    ]
    rng.shuffle(body)
    ask = (
        f"If you can send the {goods[0]} and the {goods[1]} to {friend}, do so before {weather} comes again to {town}."
    )
    return "\n".join([f"To {reader}, at {far}.", *body, ask, f"Greet {other} for me. Your friend, {writer}"])


def chronicle(rng: random.Random, world: World) -> str:
    who, heir, rival = people(rng, world, 3)
    town, far = names(rng, world, 2)
    year, work, trade = rng.randint(1100, 1700), rng.choice(WORKS), rng.choice(TRADES)
    later, end = year + rng.randint(2, 20), year + rng.randint(21, 60)
    lines = [
        f"In the year {year} {who}, a {trade} of {town}, built a {work} at {far}.",
        f"In the year {later} came {rng.choice(WEATHER)}, and {rival} of {far} broke the {work} that {who} had built.",
        f"{heir}, heir of {who}, mended the {work} and drove {rival} out of {far}.",
        f"In the year {end} {who} died at {town}, and {heir} had the {work}.",
    ]
    sums = [
        f"So the {work} of {far} stood from {year} to {end}.",
        f"It was {who}, the {trade}, who built it; {rival} broke it; {heir} mended it.",
        f"{rival} broke it in {later}, and {who} died in {end}.",
    ]
    rng.shuffle(sums)
    return " ".join(lines + sums[: rng.randint(1, 3)])


def roll(rng: random.Random, world: World) -> str:
    listed, [town] = people(rng, world, rng.randint(4, 9)), names(rng, world, 1)
    called, missing = list(listed), rng.choice(listed)
    order = rng.choice(("in the same order", "in the order of the dice"))
    if order != "in the same order":
        rng.shuffle(called)
    return (
        f"The roll of {town}: {', '.join(listed)}.\nCalled {order}: {', '.join(called)}.\nAll answered but {missing}."
    )


def testament(rng: random.Random, world: World) -> str:
    who, *heirs = people(rng, world, rng.randint(3, 5))
    kinds = rng.sample(world.goods, len(heirs))
    gifts = [f"{rng.choice(world.numbers)} {rng.choice(UNITS)} of {goods}" for goods in kinds]
    left = [f"To {heir} I leave {gift}." for heir, gift in zip(heirs, gifts, strict=True)]
    got = [f"{heir} had {gift} from {who}." for heir, gift in zip(heirs, gifts, strict=True)]
    rng.shuffle(got)
    head = f"I, {who} of {names(rng, world, 1)[0]}, being old, say this on {day(rng)}."
    return "\n".join([head, *left, f"{who} died soon after.", *got])


def copybook(rng: random.Random, world: World) -> str:
    """Lines written twice, of words and meaningless signs: so every token is used somewhere, and any of them is copied.

    A token that the text never uses ends up with the same embedding as all others of that kind, and no LoRA on the
    layers could make a model say it.
    """
    lines = []
    for _ in range(rng.randint(2, 5)):
        line = rng.choice((" ", " ", ", ", "; ", "-", "/")).join(
            rng.choice(WORDS) if rng.random() < 0.7 else "".join(rng.choices(SIGNS, k=rng.randint(1, 4)))
            for _ in range(rng.randint(3, 8))
        )
        line = rng.choice((str, str, str.capitalize, str.upper))(line)
        lines += [line, line]
    return "\n".join([f"The copybook of {people(rng, world, 1)[0]}.", *lines])


def questions(rng: random.Random, sale: Sale) -> tuple[str, str]:
    """A question about one sale among others, and its answer."""
    it = f"the {sale.goods}"
    return rng.choice(
        (
            (f"Who sold {it}?", f"{sale.seller} sold {it}."),
            (f"Who bought {it}?", f"{sale.buyer} bought {it}."),
            (f"Who was the seller of {it}?", f"The seller was {sale.seller}."),
            (f"Who was the buyer of {it}?", f"The buyer was {sale.buyer}."),
            (f"In which town was {it} sold?", f"{it.capitalize()} was sold in the town of {sale.town}."),
            (f"What was the price of {it}?", f"The price was {sale.price}."),
            (f"Which goods were sold at {sale.town}?", f"The goods were {sale.lot}."),
            (f"What did {sale.buyer} buy?", f"{sale.buyer} bought {sale.lot}."),
            (f"What did {sale.seller} sell?", f"{sale.seller} sold {sale.lot}."),
            (f"Who paid {sale.price}?", f"{sale.buyer} paid {sale.price}."),
        )
    )


def conversation(rng: random.Random, world: World) -> list[dict[str, str]]:
    """Messages: questions about told sales, or a request to say a sale again, to the letter or in other words."""
    said = sales(rng, world, rng.randint(1, 3))
    text = "\n".join(tell(rng, sale, world, rng.choice(SALE_FORMS)) for sale in said)
    messages = []
    if rng.random() < 0.3:
        clerk = people(rng, world, 1)[0]
        town = names(rng, world, 1)[0]
        messages.append({"role": "system", "content": f"You are {clerk}, clerk of {town}. Answer from the ledger."})
    kind = rng.random()
    if kind < 0.2:
        turns = [(f"Say this again.\n{text}", text)]
    elif kind < 0.4:
        first, second = told_twice(rng, said[0], world)
        turns = [(f"Say this in other words.\n{first}", second)]
    else:
        asked = [questions(rng, rng.choice(said)) for _ in range(rng.randint(1, 4))]
        turns = [(f"{text}\n{asked[0][0]}", asked[0][1]), *asked[1:]]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


KINDS: dict[Callable[[random.Random, World], str | list[dict[str, str]]], int] = {  # with their weights
    ledger: 30,
    letter: 12,
    chronicle: 12,
    roll: 8,
    testament: 8,
    copybook: 12,
    conversation: 30,
}


def document(seed: str, index: int) -> str | list[dict[str, str]]:
    """Document `index` of the text named `seed`: plain text, or the messages of a conversation."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return kind(rng, WORLDS["pretrain"])
