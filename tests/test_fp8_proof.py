"""scripts/fp8_proof.py: a toy of the whole proof, and what it judges."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import fp8_proof


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Enough text for a few windows, and 40 problems, the last one cut off."""
    words = [f"{a}{b}" for a in ("north", "river", "stone", "amber") for b in ("gate", "field", "ford", "wick")]
    (tmp_path / "text").mkdir()
    text = " ".join(words[(i * i + 7 * i) % len(words)] + "\u2028" * (i % 50 == 0) for i in range(9000))
    (tmp_path / "text" / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "sft").mkdir()
    rows = [{"question": f"What is {i} and {i + 1}?\u2028", "answer": f"{i} + {i + 1} = {2 * i + 1}"} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "sft" / "gsm8k_train.jsonl").write_text("\n".join(lines) + '\n{"question": "cut', encoding="utf-8")
    return tmp_path


def test_a_toy_of_all_of_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fp8_proof.main(["--data", str(data), "--tiny", "--json", str(tmp_path / "out" / "proof.json")]) == 0
    found, printed = json.loads((tmp_path / "out" / "proof.json").read_text()), capsys.readouterr().out
    assert "1 of 41 lines are cut off" in printed and "FP8: 14 frozen linears" in printed
    (runs,) = found["runs"].values()
    assert {name: len(run["losses"]) for name, run in runs.items()} == {"none": 4, "fp8": 4}
    assert runs["none"]["losses"] != runs["fp8"]["losses"]
    assert 0 < found["figures"]["curve_difference"] < 0.01 and found["base"]["config"]["hidden_size"] == 64


def test_problems_trained_later_are_not_in_the_text(data: Path) -> None:
    documents, rest = fp8_proof.read_data(data)
    assert len(rest) == 8 and not any(problem["question"] in text for problem in rest for text in documents)
    with pytest.raises(SystemExit, match="there must be text"):
        fp8_proof.read_data(data / "text")


def run(losses: list[float], valid: float) -> dict:
    return {"losses": losses, "valid_loss": valid}


def test_what_is_judged() -> None:
    """By hand: the curves are 1% and 0% apart, the held-out losses 1% and 0.4%."""
    runs = {
        0: {"none": run([2.0, 1.0], 1.0), "fp8": run([2.02, 0.99], 1.01)},
        1: {"none": run([2.0, 4.0], 1.25), "fp8": run([2.0, 4.0], 1.255)},
    }
    figures = fp8_proof.judge({"share": 0.5}, runs)
    assert figures["curve_difference"] == pytest.approx(0.005) and figures["held_out_difference"] == pytest.approx(0.007)
    assert figures["bf16_held_out_spread"] == pytest.approx(0.25 / 1.125) and figures["bf16_curves_apart"] == [1.5]
    assert figures["missed"] == []
    runs[0]["fp8"] = run([2.1, 0.98], 1.03)
    assert fp8_proof.judge({"share": 0.61}, runs)["missed"] == [
        "pretrained_share_of_unigram", "curve_difference", "held_out_difference",
    ]  # fmt: skip
    runs[0]["fp8"] = run([float("nan"), 0.98], 1.01)
    assert "curve_difference" in fp8_proof.judge({"share": 0.5}, runs)["missed"]
