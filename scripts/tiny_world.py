"""The small invented world that the embedded tiny Llama speaks of: names, sales, and the skill that the demo teaches.

`skill_row(share, seed, index)` is one row of the instruction set: a sale told in a sentence, and its record
`seller: ...; buyer: ...; goods: ...; town: ...; price: ...`. It is a pure function of its arguments, as all text is,
here and in tiny_text.py, which holds the documents for pre-training.

The world is split so that nothing which decides a held-out answer was seen before: every name belongs to exactly one of
the shares "pretrain", "train" and "valid", every kind of goods and every number of an instruction row to "train" or to
"valid". (Documents use all goods and numbers, which are words of the language, but no document holds a record.)
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SHARES = {"pretrain": range(0, 90), "train": range(90, 97), "valid": range(97, 100)}  # percent of all possible names

# A name is a head and a tail, or a head, a middle and a tail: 7,500 and 250,000 of them, too many to learn by heart.
# (With 2,000 names the model knew by heart which it had met, and got 5% of the pieces wrong when it copied another.)
HEADS = (
    "Aber Al An Ard Ash Bal Ber Black Bran Brook Cal Car Clay Cor Crom Crow Dale Dan Den Dor Dun El Elm Esk Fair Fal "
    "Fen Fox Gar Glen Gold Gor Green Hal Har Hart Haw Holt In Is Jor Kel Kil King Lang Loch Lor Mal Mar Marsh Mer "
    "Ness Nor Oak Or Os Ox Pen Per Pol Quin Red Ros Ruth Sel Skel Stan Strath Tar Thorn Tor Tul Ul Under Ur Ver Wal "
    "Wen West White Wick Wil Yor"
).split()
MIDDLES = "a ba be da den der do el en er fer go ha i in la le li lo ma mi na ne o ra re ri ro sa ta ve".split()
TAILS = (
    "a ac ach al an ard as bay beck bert brae burgh bury by cairn combe cott croft dale del den dell don dour dric "
    "dun ella en eth fell field firth ford garth gate gow ham head hurst ia ian ic ick ida in ira is kirk land ley "
    "lin low man more mouth mund nock ola on pool ra rick ridge rin ris row sey side son stead ster stone ta tan tarn "
    "ton us vin wall ward well wen win wood worth wyn yn"
).split()
GOODS = (
    "alum amber ash barley beans beeswax bran brass brick bristle butter candles canvas carrots cedar chalk charcoal "
    "cheese cider cinders clay cloth clover coal copper cork corn cotton eels feathers felt figs fish flax fleece "
    "flint flour fur ginger glass glue grain gravel grease gypsum ham hay hemp herring hides honey hops horn indigo "
    "ink iron ivory lace lard lead leather lentils lime linen madder malt marble mead mica millet mint mortar moss "
    "mustard mutton nails nuts oak oats oil onions paper parchment peas peat pepper pewter pitch plaster plums pork "
    "quills reeds resin rice rope rye saffron sage salt sand silk silver slate soap soot spelt starch steel straw "
    "sugar sulphur tallow tar tea thread thyme timber tin turf turnips turpentine twine varnish vinegar walnuts wax "
    "wheat willow wine wire wool yarn"
).split()
UNITS = "barrels baskets bundles carts chests crates loads sacks".split()
COINS = "crowns ducats florins marks pence shillings".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()

# One sale, told in many ways. The record has to be found by meaning: the order of the parts and the voice differ, and a
# third person, a second number (the lot) and sometimes a second town stand in the way.
SALE_FORMS = (
    "On {date} {seller} sold {lot} to {buyer} for {price}, at {town}.",
    "At {town}, on {date}, {buyer} bought {lot} from {seller} for {price}.",
    "{buyer} paid {price} to {seller} for {lot}; it was done at {town} on {date}, and {witness} saw it.",
    "{lot} passed from {seller} to {buyer} on {date}, at {town}, for {price}, with {witness} as witness.",
    "Before {witness}, at {town}, {seller} gave up {lot} to {buyer}, who paid {price} on {date}.",
    "{witness} wrote that {seller} had {price} of {buyer} for {lot}, at {town}, on {date}.",
    "For {price} {buyer} had {lot} of {seller} on {date}; {witness} weighed it at {town}.",
    "{seller} came to {town} with {lot}; {buyer} took it all on {date} and paid {price}.",
    "The market of {town} saw {lot} go to {buyer} on {date}; {seller} took {price} for it.",
    "{buyer}, not {witness}, bought the {lot} that {seller} brought to {town}, and paid {price} on {date}.",
    "Sold on {date} at {town} by {seller}, to {buyer}: {lot}, for {price}.",
    "Bought on {date} at {town} by {buyer}, of {seller}: {lot}, for {price}.",
)
RECORD_FORM = "seller: {seller}; buyer: {buyer}; goods: {goods}; town: {town}; price: {amount}"
SKILL_REQUEST = "Enter this sale in the register. {sale}"


@dataclass(frozen=True)
class World:
    """What one share of the world may speak of."""

    share: str  # which names
    goods: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Sale:
    """One sale; every field is text as it stands in a sentence."""

    seller: str
    buyer: str
    witness: str
    goods: str
    lot: str  # 24 barrels of pitch
    town: str
    date: str
    price: str  # 310 crowns
    amount: str  # 310


def percent_of(word: str) -> int:
    """Where a word falls in 0 .. 99: even-handed, fixed by its spelling, and the same on every machine."""
    return zlib.crc32(word.encode()) % 100


def build_world(share: str) -> World:
    """The world of `share`; "train" and "valid", of the instruction set, have no goods or number in common."""
    if share == "pretrain":
        return World(share, tuple(GOODS), tuple(range(11, 1000)))
    held_out = share == "valid"  # a third of the goods, a fifth of the numbers
    goods = tuple(word for place, word in enumerate(GOODS) if (place % 3 == 0) == held_out)
    return World(share, goods, tuple(n for n in range(11, 1000) if (percent_of(str(n)) >= 80) == held_out))


WORLDS = {share: build_world(share) for share in SHARES}


def names(rng: random.Random, world: World, count: int) -> list[str]:
    """`count` different names, of people's first or last or of towns, that the world's share owns."""
    found: list[str] = []
    while len(found) < count:
        name = rng.choice(HEADS) + (rng.choice(MIDDLES) if rng.random() < 0.4 else "") + rng.choice(TAILS)
        if percent_of(name) in SHARES[world.share] and name not in found:
            found.append(name)
    return found


def people(rng: random.Random, world: World, count: int) -> list[str]:
    """`count` people; no name stands twice among them, so that one half of a full name decides the other."""
    halves = names(rng, world, 2 * count)
    return [f"{first} {last}" for first, last in zip(halves[::2], halves[1::2], strict=True)]


def day(rng: random.Random) -> str:
    return f"the {rng.choice(DAYS)} of {rng.choice(MONTHS)}"


def sales(rng: random.Random, world: World, count: int) -> list[Sale]:
    """`count` sales of different goods, at different towns and prices, each among three people of its own."""
    trio, towns = people(rng, world, 3 * count), names(rng, world, count)
    goods, numbers = rng.sample(world.goods, count), rng.sample(world.numbers, 2 * count)
    return [
        Sale(
            seller=trio[3 * i],
            buyer=trio[3 * i + 1],
            witness=trio[3 * i + 2],
            goods=goods[i],
            lot=f"{numbers[2 * i]} {rng.choice(UNITS)} of {goods[i]}",
            town=towns[i],
            date=day(rng),
            price=f"{numbers[2 * i + 1]} {rng.choice(COINS)}",
            amount=str(numbers[2 * i + 1]),
        )
        for i in range(count)
    ]


def tell(rng: random.Random, sale: Sale, world: World, form: str) -> str:
    """The sale in a sentence of the given form; in two of five, one of the people is said to be of another town."""
    fields = dict(vars(sale))
    if rng.random() < 0.4:
        who = rng.choice(("seller", "buyer", "witness"))
        fields[who] += f" of {names(rng, world, 1)[0]}"
    return form.format(**fields)


def told_twice(rng: random.Random, sale: Sale, world: World) -> tuple[str, str]:
    """The same sale in two different forms."""
    first, second = rng.sample(SALE_FORMS, 2)
    return tell(rng, sale, world, first), tell(rng, sale, world, second)


def skill_row(share: str, seed: str, index: int) -> dict[str, list[dict[str, str]]]:
    """Row `index` of the instruction set, in OpenAI's `messages` format; `share` is "train" or "valid"."""
    rng = random.Random(f"{seed}/{share}/{index}")
    world = WORLDS[share]
    sale = sales(rng, world, 1)[0]
    request = SKILL_REQUEST.format(sale=tell(rng, sale, world, rng.choice(SALE_FORMS)))
    record = RECORD_FORM.format(**vars(sale))
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": record}]}


def skill_rows(share: str, seed: str, count: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    return (skill_row(share, seed, index) for index in range(count))


# The demo of preferences: a sale told again in other words, where both tellings are right and the buyer's side is preferred.
BUYER_FORMS = tuple(SALE_FORMS[index] for index in (1, 2, 6, 9, 11))
SELLER_FORMS = tuple(SALE_FORMS[index] for index in (0, 4, 5, 7, 10))
REPHRASE_REQUEST = "Say this in other words.\n{sale}"


def preference_row(share: str, seed: str, index: int) -> dict[str, str]:
    """Row `index` of the preference set: prompt, chosen, rejected as text; `share` is "train" or "valid"."""
    rng = random.Random(f"{seed}/{share}/{index}")
    world = WORLDS[share]
    sale = sales(rng, world, 1)[0]
    chosen, rejected = rng.choice(BUYER_FORMS), rng.choice(SELLER_FORMS)
    told = rng.choice([form for form in SALE_FORMS if form not in (chosen, rejected)])
    fields = vars(sale)
    prompt = REPHRASE_REQUEST.format(sale=tell(rng, sale, world, told))
    return {"prompt": prompt, "chosen": chosen.format(**fields), "rejected": rejected.format(**fields)}
