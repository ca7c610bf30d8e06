"""The page: valid, self-contained, escaped, and true to the numbers it is given."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sft.core.errors import InputError
from sft.core.records import (
    Candidate,
    Check,
    Cost,
    Inspection,
    Layer,
    LayerProfile,
    Option,
    Plan,
    PlanRow,
    Profile,
    Timing,
)
from sft.reporting.html import render, report

MISSING = "\N{EN DASH}"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests ask for, and fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.numbers: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")
        if tag == "strong":
            self.numbers.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "strong" in self.open:
            self.numbers[-1] += data
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data.strip()

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row[0] == start)


def _pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]


def _texts(picture: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in picture.iter("text")]


LAYER = Layer("conv", "Conv2d", (8, 4, 3, 3), True, (4, 9, 9), (8, 9, 9), 23_328)
INSPECTION = Inspection(
    "small-net",
    (4, 9, 9),
    296,
    23_328,
    (LAYER, Layer("fc", "Linear", (2, 8), False, (8,), (2,), 16)),
)
PROFILE = Profile(
    model="small-net",
    target="onnxruntime-avx2",
    fingerprint="f",
    samples=64,
    params=296,
    macs=23_328,
    size=1184,
    overhead_macs=0,
    layers=(
        LayerProfile(
            LAYER,
            {"channel_in": 0.75},
            (
                Candidate(Option("keep"), 0.0, 0.0, Cost(296, 23_328, 1184)),
                Candidate(Option("channel_in", (2,), 8), 0.2, 0.15, Cost(90, 6000, 120)),
            ),
        ),
    ),
    seed=0,
)
PLAN = Plan(
    model="small-net",
    target="onnxruntime-avx2",
    budget={"size": 0.25},
    rows=(PlanRow("conv", Option("channel_in", (2,), 8), 0.15, Cost(90, 6000, 120), "fits"),),
    cost=Cost(90, 6000, 120),
    original=Cost(296, 23_328, 1184),
    status="optimal",
    value=0.15,
    bound=0.15,
    gap=0.0,
)
CHECK = Check(False, 0.5, 12.5, 0.75, 0.5, failures=("Agreement 0.75 < 0.9.",))
TIMING = Timing(1.25, 1.125, 2.5, 7_000_000, 100, 1)


def test_page_is_well_formed_and_self_contained(result: dict[str, Any]) -> None:
    text = render(result)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    names = [tag for tag, _ in page.tags]
    assert [names.count(tag) for tag in ("html", "head", "body", "h1")] == [1, 1, 1, 1]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    assert not any({"src", "href", "xlink:href"} & set(attrs) for _, attrs in page.tags)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_headline_is_computed_from_before_and_after(result: dict[str, Any]) -> None:
    before, after = result["before"], result["after"]
    numbers = Page(render(result)).numbers
    for shown, key in zip(numbers, ("file_bytes", "macs", "latency_ms"), strict=False):
        assert shown.endswith("x")
        assert float(shown[:-1]) == pytest.approx(before[key] / after[key], rel=0.005)
    assert float(numbers[3]) == pytest.approx(100 * (after["score"] - before["score"]), abs=0.005)


def test_a_file_that_grew_is_called_larger(result: dict[str, Any]) -> None:
    result["after"]["file_bytes"] = 2 * result["before"]["file_bytes"]
    text = render(result)
    assert "larger file" in text
    assert "smaller file" not in text
    assert Page(text).numbers[0] == "2.00x"


def test_tables_show_the_numbers(result: dict[str, Any]) -> None:
    page = Page(render(result))
    assert page.row("file size")[:3] == ["file size", "2.79 MB", "310 KB"]
    assert page.row("latency, p90")[1:3] == ["1.70 ms", "0.520 ms"]
    assert page.row("weight bits planned, mean")[1:] == [MISSING, "7.5", MISSING]
    result["after"]["storage_bits_mean"] = 7.8
    stored = Page(render(result))
    assert stored.row("weight bits in the file, mean")[1:] == [MISSING, "7.8", MISSING]
    assert "7.8 bits in the file and are multiplied as 8-bit" in render(result)
    assert page.row("size")[1:] == ["10.00%", "file 11.11%, packed 8.90%"]
    assert page.row("macs")[1:] == ["30.00%", "26.46%"]
    assert page.row("max_drop")[1:] == ["0.005", "0.0029"]
    assert page.row("agreement with the original")[1] == "97.00%"
    assert page.row("stages.0.0.conv1")[1:5] == ["channel_in", "8", "8", "0.0123"]


def test_foot_tells_how_it_was_measured(result: dict[str, Any]) -> None:
    text = render(result)
    foot = text[text.index("<footer>") :]
    for words in ("AMD EPYC", "2.13.0", "1.99.1", "2 min 30 s", "12.0 s"):
        assert words in foot
    page = Page(text)
    assert page.row("seed")[1] == "3"
    assert page.row("threads")[1] == "1"


def test_verdicts_follow_the_result(result: dict[str, Any]) -> None:
    good = render(result)
    assert good.count('class="verdict good"') == 2
    assert 'class="verdict bad"' not in good
    result["budget"]["met"] = False
    result["check"] = {"passed": False, "failures": ["The <file> differs."]}
    bad = render(result)
    assert bad.count('class="verdict bad"') == 2
    assert 'class="verdict good"' not in bad
    assert "NOT met" in bad
    assert "FAILED: The &lt;file&gt; differs." in bad


def test_names_are_escaped_everywhere(result: dict[str, Any]) -> None:
    name = result["layers"][1]["name"]
    result["layers"][1] |= {"macs": 5000, "macs_before": 5000}
    result["model"] = "<b>&model"
    text = render(result)
    assert "<script" not in text
    assert "<b>" not in text
    page = Page(text)
    assert page.row(name)[0] == name
    titles = [node.text for picture in _pictures(text) for node in picture.iter("title")]
    assert name in titles


def test_missing_numbers_are_dashes(result: dict[str, Any]) -> None:
    result["after"]["latency_ms"] = None
    result["after"]["macs"] = float("nan")
    text = render(result)
    page = Page(text)
    name = result["layers"][1]["name"]
    assert page.row(name)[2:5] == [MISSING, MISSING, MISSING]
    assert page.row("latency, median")[1:] == ["1.63 ms", MISSING, MISSING]
    assert page.numbers[1:3] == [MISSING, MISSING]
    visible = text[text.index("<body>") :]
    assert not re.search(r"\bnan\b|\bNone\b", visible, re.I)


def test_picture_labels_both_points(result: dict[str, Any]) -> None:
    scatter = _pictures(render(result))[0]
    labels = [t for t in _texts(scatter) if t.startswith(("before", "after"))]
    assert labels == ["before: 2.79 MB, 94.20%", "after: 310 KB, 93.91%"]
    before, after = scatter.findall("circle")
    assert float(after.get("cx", 0)) < float(before.get("cx", 0))
    assert float(after.get("cy", 0)) > float(before.get("cy", 0))
    assert any("log scale" in t for t in _texts(scatter))
    result["after"]["file_bytes"] = 2_000_000
    assert not any("log scale" in t for t in _texts(_pictures(render(result))[0]))


def test_score_need_not_be_a_share(result: dict[str, Any]) -> None:
    result["before"]["score"], result["after"]["score"] = -31.5, -32.0
    text = render(result)
    assert _texts(_pictures(text)[0]).count("before: 2.79 MB, -31.5") == 1
    assert Page(text).numbers[3] == "-0.5"


def test_equal_points_are_drawn(result: dict[str, Any]) -> None:
    result["after"] |= {"file_bytes": 2_790_000, "score": result["before"]["score"]}
    assert len(_pictures(render(result))[0].findall("circle")) == 2
    result["before"]["score"] = result["after"]["score"] = 0
    assert len(_pictures(render(result))[0].findall("circle")) == 2


def test_bars_are_as_long_as_their_values(result: dict[str, Any]) -> None:
    pictures = _pictures(render(result))
    assert len(pictures) == 3
    for picture, ratio in zip(pictures[1:], (8 / 2, 16 / 3), strict=True):
        before, after = picture.findall("rect")
        lengths = [float(bar.get("width", 0)) for bar in (before, after)]
        assert lengths[0] / lengths[1] == pytest.approx(ratio, rel=0.01)
    assert "8.00 M" in _texts(pictures[1])
    assert "3.00 KB" in _texts(pictures[2])


def test_no_costs_no_bars(result: dict[str, Any]) -> None:
    result["layers"] = result["layers"][1:]
    assert len(_pictures(render(result))) == 1


def test_of_many_layers_the_greatest_are_drawn(result: dict[str, Any]) -> None:
    result["layers"] = [{"name": f"layer{i}", "macs": i + 1} for i in range(100)]
    text = render(result)
    bars = _pictures(text)[1]
    assert len(bars.findall("rect")) == 40
    assert next(t for t in _texts(bars) if t.startswith("layer")) == "layer60"
    assert "The 40 greatest of 100." in text


def test_report_has_a_section_for_each_record(tmp_path: Path, result: dict[str, Any]) -> None:
    path = report(tmp_path / "r.html", INSPECTION, PROFILE, PLAN, CHECK, TIMING)
    assert path == tmp_path / "r.html"
    text = path.read_text()
    page = Page(text)
    assert "<h1>small-net</h1>" in text
    expected = ["What came in", "Profile", "Plan", "Layers of the plan", "Check", "Timing"]
    assert page.titles == expected
    assert page.row("fc")[1:3] == ["Linear", "2 x 8"]
    assert "channel_in 0.75" in text
    assert "64 samples" in text
    assert page.row("latency, median") == ["latency, median", "1.25 ms"]
    assert "FAILED: Agreement 0.75 &lt; 0.9." in text
    both = report(tmp_path / "both.html", TIMING, result).read_text()
    titles = Page(both).titles
    assert titles[0] == "Timing"
    assert titles[-1] == "How it was measured"
    assert len(titles) == 6


def test_plan_is_drawn_against_the_profile_beside_it(tmp_path: Path) -> None:
    alone = _pictures(report(tmp_path / "a.html", PLAN).read_text())
    beside = _pictures(report(tmp_path / "b.html", PLAN, PROFILE).read_text())
    assert [len(p.findall("rect")) for p in alone] == [1, 1]
    assert [len(p.findall("rect")) for p in beside] == [2, 2]
    assert "23.3 K" in _texts(beside[0])
    assert "1.18 KB" in _texts(beside[1])


def test_plan_edited_by_hand_can_be_shown(tmp_path: Path) -> None:
    plan = PLAN.replace("conv", Option("dense", weight_bits=4))
    page = Page(report(tmp_path / "p.html", plan).read_text())
    row = next(row for row in page.rows if row[:2] == ["conv", "dense"])
    assert row[2:5] == [MISSING, "4", MISSING]
    assert row[5].startswith("set by hand")


@pytest.mark.parametrize("odd", [3, "result.json", None, LAYER])
def test_unknown_type_is_named_and_nothing_written(tmp_path: Path, odd: object) -> None:
    with pytest.raises(InputError, match=f"type {type(odd).__name__}"):
        report(tmp_path / "r.html", TIMING, odd)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_report_and_no_result_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to report"):
        report(tmp_path / "r.html")
    with pytest.raises(InputError, match="no result"):
        report(tmp_path / "r.html", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_existing_page_is_replaced_in_one_step(
    tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("os.replace", full)
        with pytest.raises(InputError, match="No space left"):
            report(path, result)
    assert path.read_text() == "old"
    report(str(path), result)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot write"):
        report(tmp_path / "none" / "r.html", TIMING)
