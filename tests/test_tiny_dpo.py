"""The embedded preference set is what its README says and what scripts/make_tiny_dpo.py makes."""

import json
import re
import sys
from pathlib import Path

from torchft.config import ASSETS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import make_tiny_dpo as maker  # noqa: E402
import tiny_world  # noqa: E402

FILES = ASSETS / "tiny_dpo"


def read_rows(part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FILES / f"{part}.jsonl").read_text().splitlines()]


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    maker.write_rows(tmp_path, seed=0)
    for part, count in maker.ROWS.items():
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (FILES / f"{part}.jsonl").read_bytes()
        assert len(read_rows(part)) == count
    assert sum(file.stat().st_size for file in FILES.iterdir()) < 300_000


def test_both_answers_tell_the_sale_of_the_prompt() -> None:
    """The same two people, goods and price; which side it is told from is all that makes them better or worse."""
    for row in [*read_rows("train"), *read_rows("valid")]:
        prompt = row["prompt"].removeprefix("Say this in other words.\n")
        assert row["prompt"] != prompt and row["chosen"] != row["rejected"]
        for answer in (row["chosen"], row["rejected"]):
            numbers = re.findall(r"\d+", answer)
            assert len(numbers) == 2 and set(numbers) == set(re.findall(r"\d+", prompt))
            assert answer != prompt
    assert set(tiny_world.BUYER_FORMS).isdisjoint(tiny_world.SELLER_FORMS)


def test_no_held_out_name_is_trained_on() -> None:
    """Every name belongs to its own share of the world, so that none is in both files, nor in the text of pre-training."""
    said = " ".join((*tiny_world.SALE_FORMS, *tiny_world.MONTHS, "Say")).replace("{", " ").replace("}", " ")
    names = {}
    for part in maker.ROWS:
        words = set(re.findall(r"\b[A-Z][a-z]+\b", " ".join(" ".join(row.values()) for row in read_rows(part))))
        names[part] = words - set(re.findall(r"\w+", said)) - {word.capitalize() for word in tiny_world.GOODS}
        assert [name for name in names[part] if tiny_world.percent_of(name) not in tiny_world.SHARES[part]] == []
    assert names["train"] and names["valid"] and not names["train"] & names["valid"]
