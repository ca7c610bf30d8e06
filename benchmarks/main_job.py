"""The figures of the main job: the embedded network through the whole way, files measured.

    python benchmarks/main_job.py            runs `sft demo` afresh, then reads its result
    python benchmarks/main_job.py --read DIR reads the result.json of an earlier run

Every figure is of the exported files: the full 10,000 test images, one thread, batch 1, before and
after timed in turn in one run. Writes `benchmarks/results/main_job-<machine>.csv` and the README's
picture `docs/demo.svg`; the last line printed is one JSON object. Run it on an idle machine.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sft.reporting.svg import Point, size_against_score

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #444 } .tick, .value { fill: #777 }
.grid { stroke: #ddd } .way { stroke: #888; stroke-width: 1.5; stroke-dasharray: 4 4 }
.before { fill: #8fa5b5 } .after { fill: #14619c } .axis { stroke: #888 }
</style>"""
OUT = Path("out/demo")
COMPRESSING = ("profile", "plan", "apply", "finetune", "quantise", "export")

Figure = tuple[str, float, str, float]  # name, measured, ">=" or "<=", wanted


def main() -> None:
    options = _parse()
    folder = options.read or OUT
    seconds = None
    if options.read is None:
        shutil.rmtree(OUT, ignore_errors=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "sft", "demo", "-o", str(OUT)], check=True)
        seconds = time.monotonic() - started
    result = json.loads((folder / "result.json").read_text())
    figures = _figures(result, seconds)
    path = _write(result, figures)
    _draw(result)
    for name, measured, sense, wanted in figures:
        verdict = _verdict(measured, sense, wanted)
        print(f"{name:28} {measured:10.3f}  wanted {sense} {wanted:<8} {verdict}")
    print(f"written to {path}")
    print(json.dumps({name: round(measured, 4) for name, measured, _, _ in figures}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, metavar="DIR")
    return parser.parse_args()


def _figures(result: dict[str, Any], seconds: float | None) -> list[Figure]:
    before, after = result["before"], result["after"]

    def ratio(key: str) -> float:
        return float(before[key]) / float(after[key])

    validation = result["budget"]["validation_score"]
    found: list[Figure] = [
        ("fp32_test_accuracy", 100 * before["score"], ">=", 94.0),
        ("onnx_size_ratio", ratio("file_bytes"), ">=", 8.0),
        ("safetensors_size_ratio", ratio("packed_bytes"), ">=", 8.0),
        ("macs_ratio", ratio("macs"), ">=", 2.0),
        ("latency_ratio_median", ratio("latency_ms"), ">=", 2.3),
        ("latency_ratio_min", ratio("latency_ms_min"), ">=", 2.3),
        ("test_drop_points", 100 * (before["score"] - after["score"]), "<=", 0.5),
        ("validation_drop_points", 100 * (validation["before"] - validation["after"]), "<=", 0.5),
        ("integer_macs_fraction", result["check"]["integer_macs_fraction"], ">=", 1.0),
        ("compress_seconds", sum(result["seconds"].get(k, 0) for k in COMPRESSING), "<=", 300.0),
    ]
    if seconds is not None:
        found.append(("demo_seconds", seconds, "<=", 600.0))
    return found


def _verdict(measured: float, sense: str, wanted: float) -> str:
    met = measured >= wanted if sense == ">=" else measured <= wanted
    return "met" if met else "MISSED"


def _write(result: dict[str, Any], figures: list[Figure]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^A-Za-z0-9]+", "-", result["machine"]).strip("-").lower()
    path = RESULTS / f"main_job-{machine}.csv"
    versions = " ".join(f"{k}={v}" for k, v in result["versions"].items() if v)
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["figure", "measured", "sense", "wanted", "verdict"])
        for name, measured, sense, wanted in figures:
            table.writerow(
                [name, f"{measured:.4f}", sense, wanted, _verdict(measured, sense, wanted)]
            )
        for key in ("machine", "threads", "seed", "data", "target"):
            table.writerow([key, result[key], "", "", ""])
        table.writerow(["versions", versions, "", "", ""])
        for side in ("before", "after"):
            for key, value in result[side].items():
                table.writerow([f"{side}.{key}", value, "", "", ""])
        for row in result["layers"]:
            rank = ",".join(map(str, row["rank"])) or "-"
            table.writerow([f"layer.{row['name']}", f"{row['scheme']} {rank}", "", "", ""])
    return path


def _draw(result: dict[str, Any]) -> None:
    """The README's picture: size of the exported file against accuracy."""
    points = [
        Point(side, side, result[side]["file_bytes"], 100 * result[side]["score"])
        for side in ("before", "after")
    ]
    drawing = size_against_score(points, "accuracy on the test images", "%")
    head, _, body = drawing.partition(">")
    namespace = "" if "xmlns" in head else ' xmlns="http://www.w3.org/2000/svg"'
    PICTURE.write_text(f'{head}{namespace} width="640">{STYLE}{body}\n')


if __name__ == "__main__":
    main()
