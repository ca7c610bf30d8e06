"""The command line: verbs, exit codes, one clear paragraph for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from sft.cli import build_parser, main
from sft.decompositions import decompositions

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from conftest import SmallNet, made_data, trained_net

def untrained():
    return SmallNet()

def data():
    return made_data()

def broken():
    raise ValueError("no weights today")

calls = []

def falling(predict, loader):
    calls.append(1)
    return 1 / len(calls)

def half(predict, loader):
    return 0.5
"""


@pytest.fixture
def project(tmp_path, monkeypatch, net):
    """A folder with a user's module, weights and data, as the current directory."""
    name = f"usernet_{os.getpid()}_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY.format(tests=str(Path(__file__).parent)))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments, "--quiet"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def model(project: str) -> list[str]:
    return [f"{project}:untrained", "--weights", "w.safetensors", "--data", f"{project}:data"]


def test_compress_prints_the_result_and_writes_it(project, capsys) -> None:
    code, out, _ = call(
        capsys, "compress", *model(project), "--size", "0.9", "--macs", "0.7", "--evaluate", "top1",
        "--steps", "5", "--integer-steps", "3", "-o", "out", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == json.loads(Path("out/result.json").read_text())


def test_the_steps_one_by_one(project, capsys) -> None:
    net = model(project)
    assert call(capsys, "inspect", *net)[0] == 0
    assert call(capsys, "profile", *net, "-o", "p")[0] == 0
    code, out, _ = call(capsys, "plan", "p", "--macs", "0.7", "-o", "plan.json", "--json")
    assert code == 0
    assert json.loads(out)["cost"]["macs"] <= 0.7 * json.loads(out)["original"]["macs"]
    planned = ["--plan", "plan.json", "--profile", "p"]
    assert call(capsys, "apply", *net, *planned, "-o", "a.safetensors")[0] == 0
    assert call(capsys, "finetune", *net, *planned, "--steps", "3", "-o", "t.safetensors")[0] == 0
    assert Path("a.safetensors").read_bytes() != Path("t.safetensors").read_bytes()
    plain = call(capsys, "export", *net, *planned, "-o", "plain.onnx")
    tuned = call(capsys, "export", *net, *planned, "--tuned", "t.safetensors", "-o", "m.onnx")
    assert plain[0] == tuned[0] == 0
    assert Path("plain.onnx").read_bytes() != Path("m.onnx").read_bytes()
    code, out, _ = call(capsys, "verify", "m.onnx", *net, "--json")
    assert code == 0
    assert json.loads(out)["integer_macs_fraction"] == 1.0
    code, out, _ = call(capsys, "benchmark", "m.onnx", "plain.onnx", "--json")
    assert code == 0
    assert len(json.loads(out)) == 2


def test_a_plan_edited_by_hand_is_followed_or_refused_by_layer_name(project, capsys) -> None:
    net = model(project)
    call(capsys, "profile", *net, "-o", "p")
    call(capsys, "plan", "p", "-o", "plan.json")
    text = json.loads(Path("plan.json").read_text())
    row = next(r for r in text["rows"] if r["name"] == "body")
    row["option"] = {"scheme": "channel_in", "rank": [8], "weight_bits": 8}
    Path("plan.json").write_text(json.dumps(text))
    planned = ["--plan", "plan.json", "--profile", "p"]
    assert call(capsys, "apply", *net, *planned, "-o", "a.safetensors")[0] == 0
    from safetensors.torch import load_file

    assert load_file("a.safetensors")["body.first.weight"].shape == (8, 16, 1, 1)
    row["option"]["rank"] = [900]
    Path("plan.json").write_text(json.dumps(text))
    code, _, err = call(capsys, "apply", *net, *planned, "-o", "b.safetensors")
    assert code == 2
    assert "'body'" in err
    row["option"]["scheme"] = 7
    Path("plan.json").write_text(json.dumps(text))
    assert call(capsys, "apply", *net, *planned, "-o", "b.safetensors")[0] == 2
    assert not Path("b.safetensors").exists()


def menus(capsys, project: str, *options: str) -> list[dict]:
    """The profile of the small net, by the command: its layers, with their menus."""
    code, out, err = call(
        capsys, "profile", *model(project), "--target", "onnxruntime-avx2", *options,
        "--no-latency", "--json",
    )  # fmt: skip
    assert code == 0, err
    return json.loads(out)["layers"]


def test_the_options_of_profile_reach_the_menus(project, capsys) -> None:
    usual = menus(capsys, project)
    two = menus(capsys, project, "--scheme", "spatial", "--scheme", "tucker2")
    multiple = menus(capsys, project, "--rank-multiple", "5")
    narrow = menus(capsys, project, "--weight-bits", "4")
    both = menus(capsys, project, "--weight-bits", "4", "8")
    in_float = menus(capsys, project, "--float")

    def options(layers: list[dict], key: str) -> set:
        found = [c["option"] for layer in layers for c in layer["candidates"]]
        return {str(o[key]) if key == "rank" else o[key] for o in found}

    assert options(usual, "scheme") == {"keep", "dense", "stored", "channel_in", "channel_out"}
    assert options(two, "scheme") == {"keep", "dense", "stored", "spatial", "tucker2"}
    assert "[5]" in options(multiple, "rank") - options(usual, "rank")
    assert options(usual, "weight_bits") == {None, 8, 4, 2}
    assert options(narrow, "weight_bits") == {None, 4}
    assert options(both, "weight_bits") == {None, 4, 8}
    assert options(in_float, "weight_bits") == {None}
    assert options(in_float, "scheme") == {"keep", "channel_in", "channel_out"}


def test_profile_times_unless_told_not_to_and_keeps_what_is_finished(project, capsys) -> None:
    timed = ["profile", *model(project), "--json", "-o", "p", "--resume", "begun"]
    code, out, err = call(capsys, *timed)
    assert code == 0, err
    assert json.loads(out)["latency"] > 0
    layers = sorted(Path("begun/layers").glob("*.json"))
    assert len(layers) == len(json.loads(out)["layers"])
    code, out, _ = call(capsys, "profile", *model(project), "--json", "-o", "q", "--no-latency")
    assert code == 0
    assert json.loads(out)["latency"] is None
    code, _, err = call(capsys, *timed, "--weight-bits", "8")
    assert code == 2
    assert "options" in err


def profile_with_made_latency(project: str, capsys) -> None:
    """A stored profile whose milliseconds follow the MACs, whatever this machine is fast at."""
    assert call(capsys, "profile", *model(project), "-o", "p", "--no-latency")[0] == 0
    stored = json.loads(Path("p/profile.json").read_text())
    for layer in stored["layers"]:
        for candidate in layer["candidates"]:
            candidate["cost"]["latency"] = candidate["cost"]["macs"] * 1e-6
    stored["latency"] = 2e-6 * stored["macs"]
    Path("p/profile.json").write_text(json.dumps(stored))


def test_the_options_of_plan_reach_the_plan(project, capsys) -> None:
    profile_with_made_latency(project, capsys)

    def planned(*options: str) -> dict:
        code, out, err = call(capsys, "plan", "p", *options, "--json")
        assert code == 0, err
        return json.loads(out)

    by_hand = planned("--option", "bo*=channel_in:8@4", "--option", "fc=keep")
    options = {row["name"]: row["option"] for row in by_hand["rows"]}
    assert options["body"] == {"scheme": "channel_in", "rank": [8], "weight_bits": 4}
    assert options["fc"]["scheme"] == "keep"
    whole = planned()
    for cost, share in (("latency", 0.7), ("memory", 1.0)):
        limit = share * whole["cost"][cost] / whole["original"][cost]
        most = share * whole["cost"][cost] * (1 + 1e-9)
        assert planned(f"--{cost}", str(limit))["cost"][cost] <= most
    least = 0.7 * whole["cost"]["latency"]
    assert planned("--latency-ms", str(least))["cost"]["latency"] <= least * (1 + 1e-9)
    kept = planned("--option", "*=keep")
    tight = str(int(kept["cost"]["memory"] * 0.6))
    assert planned("--memory-bytes", tight)["cost"]["memory"] <= int(tight)
    code, _, err = call(capsys, "plan", "p", "--option", "*=keep", "--memory-bytes", tight)
    assert code == 1
    assert "memory" in err
    code, _, err = call(capsys, "plan", "p", "--memory-bytes", "1")
    assert code == 1
    assert "memory_bytes" in err
    size = ["--size-bytes", str(int(0.6 * whole["cost"]["size"]))]
    exact, quick = planned(*size), planned(*size, "--method", "lagrangian")
    assert quick["value"] >= exact["value"] * (1 - 1e-9)
    assert quick["cost"]["size"] <= 0.6 * whole["cost"]["size"]


@pytest.mark.parametrize("cost", ["size", "latency"])
def test_plan_writes_the_front_it_is_asked_for(project, capsys, cost) -> None:
    profile_with_made_latency(project, capsys)
    code, _, err = call(capsys, "plan", "p", "--front", "front.json", "--front-cost", cost)
    assert code == 0, err
    found = json.loads(Path("front.json").read_text())
    costs = [point["cost"][cost] for point in found["points"]]
    assert found["cost"] == cost
    assert costs == sorted(costs)
    assert len(costs) > 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fc", "a part is missing"),
        ("fc=", "a part is missing"),
        ("=dense", "a part is missing"),
        ("fc=dense@nine", "nine"),
        ("fc=dense@9", "9"),
        ("fc=channel_in:0@8", "rank"),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_with_the_reason(
    project, capsys, text, reason
) -> None:
    profile_with_made_latency(project, capsys)
    code, _, err = call(capsys, "plan", "p", "--option", text)
    assert code == 2
    assert f"--option {text}: " in err
    said = err.partition("(")[2]
    assert reason in said
    assert "pydantic" not in err


def test_an_option_that_is_on_no_menu_is_refused_with_the_nearest(project, capsys) -> None:
    profile_with_made_latency(project, capsys)
    code, _, err = call(capsys, "plan", "p", "--option", "fc=channel_in@8")
    assert code == 2
    assert "for layer 'fc'" in err
    assert "dense @8" in err


def test_two_options_for_one_layer_are_refused(project, capsys) -> None:
    profile_with_made_latency(project, capsys)
    code, _, err = call(capsys, "plan", "p", "--option", "fc=dense@4", "--option", "fc=dense@8")
    assert code == 2
    assert "names 'fc' twice" in err


def test_the_front_is_written_where_the_budget_cannot_be_met(project, capsys) -> None:
    profile_with_made_latency(project, capsys)
    code, _, _ = call(capsys, "plan", "p", "--macs", "1e-6", "--front", "front.json")
    assert code == 1
    assert json.loads(Path("front.json").read_text())["points"]


def test_plan_takes_no_options_of_measuring(project, capsys) -> None:
    profile_with_made_latency(project, capsys)
    for extra in ("--target", "--threads", "--device", "--seed"):
        with pytest.raises(SystemExit) as ended:
            call(capsys, "plan", "p", extra, "1")
        assert ended.value.code == 2


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (["--loss-aware"], "error"),
        (["--anchor-samples", "16"], "damage"),
        (["--anchor-error", "0.9"], "damage"),
    ],
)
def test_the_measuring_options_of_profile_move_the_numbers(project, capsys, change, moved) -> None:
    ranks = ["--scheme", "channel_out", "--rank-multiple", "2"]
    usual, changed = (menus(capsys, project, *ranks, *more) for more in ([], change))
    candidates = [[c for x in layers for c in x["candidates"]] for layers in (usual, changed)]
    if moved == "damage":
        before, after = ([(c["option"], c["error"]) for c in found] for found in candidates)
        assert before == after
    numbers = [[c[moved] for c in found] for found in candidates]
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--scheme", "cp"], "no decomposition 'cp'"),
        (["--weight-bits", "9"], "weight_bits=9"),
        (["--rank-multiple", "0"], "rank_multiple=0"),
        (["--anchor-samples", "-1"], "anchor_samples=-1"),
        (["--anchor-error", "nan"], "anchor_error=nan"),
    ],
)
def test_nonsense_for_profile_is_refused(project, capsys, change, words) -> None:
    code, out, err = call(capsys, "profile", *model(project), *change)
    assert code == 2
    assert words in err
    assert out == ""
    assert not Path("out").exists()


def test_float_and_a_width_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as error:
        build_parser().parse_args(["profile", "net", "--float", "--weight-bits", "4"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["no_such_module_at_all:net"], 2, "no_such_module_at_all"),
        (["{name}:no_such_factory"], 2, "no_such_factory"),
        (["{name}:broken"], 2, "no weights today"),
        (["no-such-model"], 2, "no-such-model"),
        (["missing.pt2"], 2, "missing.pt2"),
        (["{name}:untrained", "--weights", "missing.safetensors"], 2, "missing.safetensors"),
        (["{name}:untrained", "--data", "npz:missing.npz"], 2, "missing.npz"),
        (["{name}:untrained", "--data", "npz:threes.npz"], 2, "12"),
        (["{name}:untrained", "--data", "npz:empty.npz"], 2, "empty"),
        (["{name}:untrained", "--data", "npz:nan.npz"], 2, "NaN"),
        (["{name}:untrained", "--data", "nonsense"], 2, "nonsense"),
        (["{name}:untrained", "--target", "toaster"], 2, "toaster"),
        (["{name}:untrained", "--device", "gpu"], 2, "gpu"),
        (["{name}:untrained", "--learning-rate", "-1"], 2, "Learning rate"),
        (["{name}:untrained", "--threads", "0"], 2, "threads=0"),
        (["{name}:untrained", "--size", "7"], 2, "size=7"),
        (["{name}:untrained", "--macs", "0.001"], 1, "the least is"),
        (["{name}:untrained", "--keep", "nothing*"], 2, "nothing"),
        (["{name}:untrained", "-o", "w.safetensors/out"], 2, "cannot be written"),
        (["{name}:untrained", "--evaluate", "{name}:missing"], 2, "missing"),
    ],
)
def test_every_mistake_gives_a_paragraph_and_an_exit_code(
    project, capsys, change, code, words
) -> None:
    x = np.zeros((4, 3, 12, 12), np.float32)
    np.savez("threes.npz", x=x)
    np.savez("empty.npz", x=x[:0])
    np.savez("nan.npz", x=np.full((4, 1, 12, 12), np.nan, np.float32))
    arguments = [c.format(name=project) for c in change]
    if "--data" not in arguments:
        arguments += ["--data", f"{project}:data"]
    if not any(a in arguments for a in ("--size", "--macs")):
        arguments += ["--size", "0.9"]
    before = sorted(p.name for p in Path().iterdir())
    got, out, err = call(capsys, "compress", *arguments)
    assert got == code
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    after = sorted(p.name for p in Path().iterdir() if p.name not in ("__pycache__", "out"))
    assert after == [b for b in before if b != "__pycache__"]
    assert not list(Path().glob("out/*.json"))


PLANNED = ["no_such_module:net", "--plan", "none.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["apply", *PLANNED, "-o", "here"], "'here' is a folder"),
        (["finetune", *PLANNED, "-o", "here/"], "'here' is a folder"),
        (["finetune", *PLANNED, "-o", "t", "--log", "none/x"], "'none/x' cannot be written"),
        (["compress", "no_such_module:net", "--log", "none/x"], "'none/x' cannot be written"),
        (["export", *PLANNED, "-o", "here"], "'here' is a folder"),
        (["export", *PLANNED, "-o", "noted"], "'noted.json' is a folder"),
        (["plan", "none", "-o", "here"], "'here' is a folder"),
        (["plan", "none", "--front", "here"], "'here' is a folder"),
        (["report", "none.json", "-o", "here"], "'here' is a folder"),
        (["profile", "no_such_module:net", "-o", "file"], "'file' cannot be written"),
        (["compress", "no_such_module:net", "-o", "file"], "'file' cannot be written"),
        (["train", "no_such_module:net", "-o", "file/a"], "'file/a' cannot be written"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, arguments, words
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "noted.json"):
        Path(folder).mkdir()
    Path("file").write_text("")
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert words in err
    assert out == ""
    assert {p.name for p in Path().iterdir()} == {"here", "noted.json", "file"}


def test_outputs_in_new_folders_and_leftovers_of_a_killed_run(project, capsys) -> None:
    net = model(project)
    Path("p").mkdir()
    Path("p/.statistics.safetensors.abcd1234").write_text("half of")
    assert call(capsys, "profile", *net, "-o", "p", "--no-latency")[0] == 0
    assert {p.name for p in Path("p").iterdir()} == {"profile.json", "statistics.safetensors"}
    assert call(capsys, "plan", "p", "-o", "a/plan.json", "--front", "b/front.json")[0] == 0
    assert Path("b/front.json").is_file()
    planned = ["--plan", "a/plan.json", "--profile", "p"]
    assert call(capsys, "apply", *net, *planned, "-o", "c/a.safetensors")[0] == 0
    Path("d").mkdir()
    for left in (".t.safetensors.abcd1234", "..t.safetensors.state.abcd1234", ".t.safetensors.my"):
        Path("d", left).write_text("half of")
    tuned = ["--steps", "1", "-o", "d/t.safetensors", "--log", "d/log.jsonl"]
    assert call(capsys, "finetune", *net, *planned, *tuned)[0] == 0
    assert {p.name for p in Path("d").iterdir()} == {
        "t.safetensors", "log.jsonl", ".t.safetensors.my",
    }  # fmt: skip


def test_a_users_score_is_called(project, capsys) -> None:
    code, out, _ = call(
        capsys, "compress", *model(project), "--size", "0.9", "--steps", "0",
        "--integer-steps", "0", "--evaluate", f"{project}:half", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["after"]["score"] == 0.5


def test_a_missed_score_exits_with_1(project, capsys) -> None:
    code, _, err = call(
        capsys, "compress", *model(project), "--macs", "0.62", "--max-drop", "0.1", "--steps", "0",
        "--integer-steps", "0", "--evaluate", f"{project}:falling",
    )  # fmt: skip
    assert code == 1
    assert json.loads(Path("out/result.json").read_text())["budget"]["met"] is False
    assert "score fell by" in err


def test_a_damaged_result_is_refused(project, capsys) -> None:
    Path("r.json").write_text("{")
    code, _, err = call(capsys, "report", "r.json")
    assert code == 2
    assert "r.json" in err


def test_list_names_what_there_is(capsys) -> None:
    code, out, _ = call(capsys, "list")
    assert code == 0
    assert all(name in out for name in decompositions)
    assert "interpolative" in out
    assert "onnxruntime-avx2" in out


def test_usage_errors_exit_with_2() -> None:
    for arguments in ([], ["nonsense"], ["compress"]):
        with pytest.raises(SystemExit) as error:
            build_parser().parse_args(arguments)
        assert error.value.code == 2


def test_interruption_exits_with_130(project, capsys, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sft.models.load.load_model", interrupt)
    code, _, err = call(capsys, "inspect", *model(project))
    assert code == 130
    assert "interrupted" in err


def test_an_internal_error_exits_with_3(project, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sft.models.load.load_model", fail)
    assert call(capsys, "inspect", *model(project))[0] == 3


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sft", "--help"], capture_output=True, text=True, check=True
    )
    assert "compress" in done.stdout
