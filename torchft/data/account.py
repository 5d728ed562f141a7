"""The account of a source: every row of it is used, perhaps with notes, or dropped under a reason, which counts it once."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torchft.checks import counted
from torchft.config import DataConfig
from torchft.data.layout import Layout
from torchft.data.rows import BadRow
from torchft.errors import UserError

REFUSED = "the chat template refuses it"
LOST_CALL = "the chat template leaves out a tool call"
LINES = (".json", ".jsonl", ".csv", ".txt")  # files whose rows are counted in lines
FIRST = 5  # places named per reason
# Behind the file's name in a place: its number in the file, and what is said of the row. A hub dataset has [split] before it.
_AT = re.compile(r"(?:\[[^\]]*\])?:(\d+)(?:: (.*))?", re.DOTALL)


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    name: str  # the path in the config
    layout: Layout
    read: int = 0  # rows
    used: int = 0  # rows with at least one sample
    reasons: Counter[str] = field(default_factory=Counter)  # rows dropped: reason -> how many
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> "file:line: detail" of the first few
    notes: Counter[str] = field(default_factory=Counter)  # what happened to rows that are used
    noted: dict[str, str] = field(default_factory=dict)  # note -> file:line of the first row that it is of
    longest_dropped: int = 0  # tokens of the longest row that was dropped for its length; 0 = none was counted

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return vars(self) | {"layout": vars(self.layout)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SourceReport":
        """The report that `to_json` took apart."""
        counts = {name: Counter(values[name]) for name in ("reasons", "notes")}
        return cls(**values | counts | {"layout": Layout(**values["layout"])})

    def use(self, where: str, notes: Counter[str]) -> None:
        """Count a row as used."""
        self.used += 1
        self.notes.update(notes)
        for note in notes:
            self.noted.setdefault(note, where)

    def drop(self, where: str, error: BadRow) -> None:
        """Count a row as dropped."""
        self.reasons[error.reason] += 1
        self.longest_dropped = max(self.longest_dropped, error.num_tokens)
        places = self.places.setdefault(error.reason, [])
        if len(places) < FIRST:
            places.append(f"{where}: {error.detail}" if error.detail else where)


def brief(report: SourceReport, here: str) -> list[str]:
    """A line on the rows dropped and one on each note, for a run; none where there is nothing to say. `here`: as below."""
    lines = [f"{here}: {count:,} x {note}, first in {report.noted[note]}" for note, count in report.notes.most_common()]
    if bad := report.read - report.used:
        reason, places = next(iter(report.places.items()))  # in the order of the rows
        rows = f"{bad:,} of {counted(report.read, 'row')}"
        lines.insert(0, f"{here}: {rows} dropped (data.max_bad_rows); first {places[0]}: {reason}")
    return lines


def refuse_too_many(report: SourceReport, data_cfg: DataConfig, here: str) -> None:
    """Raises UserError for a source that loses more rows than data.max_bad_rows, or all. `here`: its config key."""
    bad = report.read - report.used
    assert bad == report.reasons.total(), (bad, report.reasons)
    if report.used and bad <= data_cfg.max_bad_rows * report.read:
        return
    share = f"{100 * bad / report.read:.1f}%, data.max_bad_rows allows {100 * data_cfg.max_bad_rows:g}%"
    advice = [*_template_advice(report), *_length_advice(report, data_cfg), "mend the rows"]
    advice += ["raise data.max_bad_rows to drop them"] * bool(report.used)
    lines = [
        f"{here}: {bad:,} of {counted(report.read, 'row')} cannot be used ({share}{'' if report.used else '; none is left'}): "
        f"{', or '.join(advice)}",
        f"the first is {_first_place(report)}",
    ]
    lines += [f"  {count:,} {reason}: {_places(report, reason)}" for reason, count in report.reasons.most_common()]
    raise UserError("\n".join(lines))


def _first_place(report: SourceReport) -> str:
    """file:line of the first row that was dropped."""
    place = next(iter(report.places.values()))[0]  # reasons are in the order of the rows
    return place[: _AT.match(place, len(report.name)).end(1)]


def _places(report: SourceReport, reason: str) -> str:
    """The first rows dropped under a reason, by their numbers in the file, which is named above, with what is said of each."""
    found = [_AT.match(place, len(report.name)).groups("") for place in report.places[reason]]
    word = "line" if report.name.endswith(LINES) else "row"
    more = " ..." * (report.reasons[reason] > FIRST)
    if len({detail for _, detail in found}) == 1:
        numbers = ", ".join(number for number, _ in found)
        return f"{word} {numbers}{more}" + (f": {found[0][1]}" if found[0][1] else "")
    return f"{word} " + ", ".join(f"{number} ({detail})" if detail else number for number, detail in found) + more


def _template_advice(report: SourceReport) -> list[str]:
    """What to do about rows that the template cannot represent, if there are any."""
    if not {REFUSED, LOST_CALL} & set(report.reasons):
        return []
    return ["choose a template that can write them with data.chat_template: a .jinja file, or the model's own (empty)"]


def _length_advice(report: SourceReport, data_cfg: DataConfig) -> list[str]:
    """What to do about rows that are too long, if there are any."""
    if not any("data.max_seq_len=" in reason for reason in report.reasons):
        return []
    known = f" (the longest row that was tokenised has {report.longest_dropped:,} tokens)" if report.longest_dropped else ""
    cut = ["cut long rows with data.truncation=right"] if data_cfg.truncation == "drop" else []
    return [f"raise data.max_seq_len{known}", *cut]
