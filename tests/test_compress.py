"""The whole way on a small network and made data."""

import json

import pytest
import torch

import sft
from sft.core.errors import BudgetError, InputError
from sft.core.files import sha256
from sft.core.records import Front
from sft.pipeline import Training, compress

QUICK = Training(steps=12, integer_steps=6)
BUDGET = sft.Budget(size=0.9, macs=0.62, max_drop=0.2)
SIDE = {
    "file_bytes", "packed_bytes", "params", "macs", "score", "latency_ms", "latency_ms_min",
    "latency_ms_p90", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def result(shared, tmp_path_factory):
    """Delivered once for the tests that only look at it."""
    return compress(
        *shared, BUDGET, evaluate=sft.top1, target="onnxruntime-avx2",
        out=tmp_path_factory.mktemp("delivered") / "out", training=QUICK,
    )  # fmt: skip


def test_what_is_delivered(result, net, data) -> None:
    out = result.out
    stored = json.loads((out / "result.json").read_text())
    assert stored == result.data
    assert set(stored["before"]) == SIDE
    assert set(stored["after"]) == SIDE | {
        "weight_bits_mean", "storage_bits_mean", "compute_bits",
    }  # fmt: skip
    assert stored["after"]["storage_bits_mean"] == stored["after"]["compute_bits"] == 8
    assert stored["budget"]["met"] is True
    assert stored["check"]["passed"] is True
    assert stored["split"] == "test"
    assert stored["metric"] == "top1"
    assert stored["after"]["file_bytes"] == (out / "model.onnx").stat().st_size
    assert stored["before"]["file_bytes"] == (out / "original.onnx").stat().st_size
    assert stored["after"]["packed_bytes"] == (out / "model.safetensors").stat().st_size
    assert stored["after"]["macs"] <= 0.62 * stored["before"]["macs"]
    assert stored["before"]["macs"] == sft.inspect(net, data.example()).macs
    counted = sum(p.numel() for p in result.model.parameters())
    assert stored["after"]["params"] == counted == result.plan.cost.params
    assert {row["name"] for row in stored["layers"]} == {"stem", "body", "down", "fc"}
    manifest = json.loads((out / "manifest.json").read_text())["sha256"]
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest) == files
    assert all(digest == sha256(out / name) for name, digest in manifest.items())
    assert "report.html" in files
    for cost in ("size", "latency"):
        drawn = Front.load(out / "profile" / f"front-{cost}.json")
        damages = [point.damage for point in drawn.points]
        assert drawn.cost == cost
        assert damages == sorted(damages, reverse=True)
    assert f"{stored['before']['macs'] / stored['after']['macs']:.2f}x" in result.summary
    result.raise_if_failed()


def test_scores_are_those_of_the_files(result, data) -> None:
    from sft.outcome import score_file

    assert score_file(result.artifact, sft.top1, data.test) == result.data["after"]["score"]


def test_the_delivered_module_can_be_loaded(result, net, data) -> None:
    restored = sft.load(result.out / "model.safetensors", net)
    x = data.test.inputs
    torch.testing.assert_close(restored(x), result.model(x), rtol=0, atol=0)


def test_the_users_model_and_generator_are_bit_identical_afterwards(net, data, tmp_path) -> None:
    net.train()
    net.body.eval()
    hook_calls = []
    net.fc.register_forward_hook(lambda *_: hook_calls.append(1))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    compress(net, data, BUDGET, out=tmp_path / "out", training=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert len(net.fc._forward_hooks) == 1
    assert all(p.grad is None for p in net.parameters())


def test_the_same_request_gives_byte_equal_files(net, data, tmp_path) -> None:
    def hashes(name: str) -> dict[str, str]:
        compress(net, data, BUDGET, out=tmp_path / name, training=QUICK, target="onnxruntime-avx2")
        files = ("model.onnx", "original.onnx", "model.safetensors", "plan.json")
        return {f: sha256(tmp_path / name / f) for f in files}

    assert hashes("a") == hashes("b")


def test_an_interrupted_run_goes_on_and_ends_in_the_same_file(
    net, data, tmp_path, monkeypatch
) -> None:
    import sft.job as job

    def run(name: str):
        return compress(net, data, BUDGET, out=tmp_path / name, training=QUICK)

    whole = run("a")
    with monkeypatch.context() as patched:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(job, "quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("b")
    assert not (tmp_path / "b" / "result.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(job, "profile", interrupt)  # must not be measured again
        resumed = run("b")
    assert resumed.artifact.sha256 == whole.artifact.sha256
    assert not (tmp_path / "b" / ".sft-work").exists()


@pytest.mark.parametrize(("rate", "kept"), [(10.0, False), (1e-3, True)])
def test_integers_that_training_harms_are_taken_as_they_were(
    net, data, tmp_path, rate, kept
) -> None:
    budget = sft.Budget(size=0.18, macs=0.62)
    untrained, trained = (
        compress(
            net, data, budget, target="onnxruntime-avx2", out=tmp_path / str(steps),
            training=Training(steps=12, integer_steps=steps, integer_learning_rate=rate),
        )
        for steps in (0, 20)
    )  # fmt: skip
    x = data.validation.inputs
    same = torch.equal(untrained.model(x), trained.model(x))
    assert same is not kept


def test_an_impossible_budget_changes_nothing(net, data, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("precious")
    with pytest.raises(BudgetError, match="the least is"):
        compress(net, data, sft.Budget(macs=0.01), out=out, training=QUICK)
    assert (out / "result.json").read_text() == "precious"


def test_a_missed_score_is_delivered_and_said(net, data, tmp_path) -> None:
    from sft.core.data import top1

    calls = []

    def falling(predict, loader) -> float:
        calls.append(1)
        return top1(predict, loader) / len(calls)

    result = compress(
        net, data, BUDGET, evaluate=falling, out=tmp_path / "out", training=Training(0, 0)
    )
    assert not result.met
    assert (
        "score fell"
        in json.loads((tmp_path / "out" / "result.json").read_text())["budget"]["missed"]
    )
    with pytest.raises(BudgetError, match="score fell"):
        result.raise_if_failed()


@pytest.mark.slow
def test_an_accuracy_floor_alone_makes_it_as_small_as_it_allows(net, data, tmp_path) -> None:
    budget = sft.Budget(max_drop=0.5, minimize="macs")
    result = compress(net, data, budget, evaluate=sft.top1, out=tmp_path / "o", training=QUICK)
    assert result.met
    assert result.data["after"]["macs"] < 0.7 * result.data["before"]["macs"]


def test_keep_and_overrides_are_obeyed(net, data, tmp_path) -> None:
    result = compress(
        net, data, sft.Budget(size=0.95), out=tmp_path / "o", training=Training(0, 0),
        keep=["f*"], overrides={"body": sft.Option("channel_in", (8,))},
    )  # fmt: skip
    assert result.plan.option("fc").scheme == "keep"
    assert result.plan.option("body") == sft.Option("channel_in", (8,))
    assert result.data["check"]["integer_macs_fraction"] < 1


def test_without_evaluate_the_score_is_the_agreement(net, data, tmp_path) -> None:
    unlabelled = sft.Data(calibration=data.calibration.inputs.split(32))
    result = compress(net, unlabelled, BUDGET, out=tmp_path / "o", training=QUICK)
    assert result.data["metric"] == "agreement"
    assert result.data["split"] == "calibration"
    assert result.data["before"]["score"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: sft.Data(calibration=[]), "calibration data is empty"),
        (lambda d: sft.Data(calibration=[torch.full((2, 1, 12, 12), float("nan"))]), "NaN"),
        (lambda d: sft.Data(calibration=[torch.randn(2, 3, 12, 12)]), "3, 12, 12"),
        (
            lambda d: sft.Data(d.calibration, test=[torch.randn(2, 1, 9, 9)]),
            "All splits must agree",
        ),
        (lambda d: sft.Data(calibration=["text"]), "type str"),
        (lambda d: sft.Data(calibration=(b for b in [torch.randn(2, 1, 12, 12)])), "generator"),
        (lambda d: sft.Data([torch.zeros(2, 1, 12, 12, dtype=torch.uint8)]), "uint8"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(net, data, tmp_path, change, words) -> None:
    with pytest.raises(InputError, match=words):
        compress(net, change(data), BUDGET, out=tmp_path / "out", training=QUICK)
    assert not (tmp_path / "out").exists()


def test_nan_in_the_weights_is_refused_by_name(net, data, tmp_path) -> None:
    with torch.no_grad():
        net.down.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"down\.weight"):
        compress(net, data, BUDGET, out=tmp_path / "out", training=QUICK)


def test_a_score_that_is_no_number_is_refused(net, data, tmp_path) -> None:
    with pytest.raises(InputError, match="evaluate returned nan"):
        compress(
            net, data, BUDGET, evaluate=lambda *_: float("nan"), out=tmp_path / "o", training=QUICK
        )


@pytest.mark.slow
def test_work_of_another_request_is_not_taken(net, data, tmp_path, monkeypatch) -> None:
    import sft.job as job

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(net, data, BUDGET, out=tmp_path / "a", training=QUICK)
    other = sft.Data(data.calibration, data.validation, data.validation, data.test)
    mixed = compress(net, other, BUDGET, out=tmp_path / "a", training=QUICK)
    fresh = compress(net, other, BUDGET, out=tmp_path / "b", training=QUICK)
    assert mixed.artifact.sha256 == fresh.artifact.sha256


def test_an_unwritable_folder_is_refused(net, data, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        compress(net, data, BUDGET, out=tmp_path / "file" / "out", training=QUICK)
