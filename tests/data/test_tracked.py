"""Tracked strings give what str gives, and know of every character where it comes from."""

import random

from conversations import words

from torchft.data.tracked import Source, Tracked, join, runs_of, track

# ------------------------------------------------------------------------------------------------------


def check_runs(text: str) -> None:
    """The runs add up, and every run that claims to be characters of its source is."""
    assert sum(length for length, _, _ in runs_of(text)) == len(text)
    position = 0
    for length, source, offset in runs_of(text):
        if source is not None and offset >= 0:
            claimed = source.text[offset : offset + length]
            assert str.__getitem__(text, slice(position, position + length)).casefold() == claimed.casefold()
        position += length


def random_operation(rng: random.Random, text: str, other: str):
    """One of str's operations with arguments, as a function of a string; `other` may be tracked."""
    cut_at = sorted(rng.randint(-len(text) - 2, len(text) + 2) for _ in range(2))
    part = text[cut_at[0] : cut_at[0] + rng.randint(1, 3)]
    count = rng.randint(-1, 2)
    return rng.choice(
        [
            lambda s: s + other,
            lambda s: other + s,
            lambda s: s * rng.choice((0, 1, 2)),
            lambda s: s[cut_at[0] : cut_at[1]],
            lambda s: s[:: rng.choice((1, 2, -1))],
            lambda s: s.strip(),
            lambda s: s.strip("x \n"),
            lambda s: s.lstrip(),
            lambda s: s.rstrip("\n"),
            lambda s: s.removeprefix(part),
            lambda s: s.removesuffix(part),
            lambda s: "|".join(s.split()),
            lambda s: s.split(part, count)[-1] if part else s,
            lambda s: s.rsplit(part, count)[0] if part else s,
            lambda s: (s.split(None, 1) or [s])[-1],
            lambda s: (s.rsplit(None, 1) or [s])[0],
            lambda s: (s.splitlines() or [s])[0],
            lambda s: (s.splitlines(True) or [s])[-1],
            lambda s: s.partition(part)[rng.choice((0, 1, 2))] if part else s,
            lambda s: s.rpartition(part)[rng.choice((0, 1, 2))] if part else s,
            lambda s: s.replace(part, other, count),
            lambda s: s.join([other, other, s]),
            lambda s: s.upper(),
            lambda s: s.lower(),
            lambda s: s.title(),
            lambda s: s.capitalize(),
            lambda s: s.swapcase(),
            lambda s: s.casefold(),
            lambda s: s.center(len(s) + 3, "*"),
            lambda s: s.ljust(len(s) + 2),
            lambda s: s.rjust(len(s) + 2, "-"),
            lambda s: s.zfill(len(s) + 2),
            lambda s: s.expandtabs(3),
            lambda s: s.translate({ord("e"): "EE", ord("n"): None}),
            lambda s: "".join(reversed(list(s))),
            lambda s: str(s),
            lambda s: "%s" % s,  # noqa: UP031
            lambda s: f"{s:>3}",
        ]
    )


def test_tracked_operations_give_what_str_gives_and_keep_their_origins():
    rng = random.Random(7)
    for number in range(1500):
        plain, other = words(rng, 0, 5), rng.choice(("", "-", " x ", "\n"))
        text, second = track(plain, Source(0, "content", plain)), track(other, Source(1, "content", other))
        for _ in range(4):
            state = rng.getstate()
            operation = random_operation(rng, str.__str__(plain), second)
            inner = rng.getstate()
            got = operation(text)
            rng.setstate(state)
            operation = random_operation(rng, plain, other)
            rng.setstate(inner)
            want = operation(plain)
            assert str.__str__(got) == want, number
            check_runs(got)
            text, plain = got, want


def test_every_str_method_that_gives_text_is_overridden():
    # No way to them from a template (dunder), or intercepted by the sandbox.
    inert = (
        "__new__",
        "__dir__",
        "__reduce__",
        "__reduce_ex__",
        "__getnewargs__",
        "__getattribute__",
        "format",
        "format_map",
    )
    probe = "a\tB "
    arguments = {
        "join": (["x"],),
        "replace": ("a", "b"),
        "translate": ({97: "b"},),
        "zfill": (9,),
        "center": (9,),
        "ljust": (9,),
    }
    arguments |= {
        "rjust": (9,),
        "partition": ("B",),
        "rpartition": ("B",),
        "removeprefix": ("a",),
        "removesuffix": (" ",),
    }
    arguments |= {
        "__add__": ("x",),
        "__mul__": (2,),
        "__rmul__": (2,),
        "__mod__": ((),),
        "__rmod__": ("%s",),
        "__getitem__": (0,),
    }
    for name in dir(str):
        method = getattr(str, name)
        if not callable(method) or name in inert:
            continue
        try:
            result = method(probe, *arguments.get(name, ()))
        except TypeError:
            continue
        if isinstance(result, (str, list, tuple)):
            assert name in vars(Tracked), f"str.{name} gives text, and Tracked would lose its origin there"


def test_joining_pieces_of_a_string_gives_its_characters_back_in_place():
    text = track("a </think> b", Source(3, "content", "a </think> b"))
    left, right = text.split("</think>")
    again = join([left, "</think>", right])
    assert [(length, source and source.message, offset) for length, source, offset in runs_of(again)] == [
        (2, 3, 0),
        (8, None, 0),
        (2, 3, 10),
    ]
