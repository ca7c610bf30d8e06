"""Every registered decomposition, through the integers, into the file, and run there."""

import pytest

from sft.core.budget import Budget
from sft.core.kernels import geometry_of
from sft.core.records import Option
from sft.decompositions import decompositions
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm, get_module
from sft.verification.parity import verify

TARGET = "onnxruntime-avx2"


@pytest.mark.parametrize("name", list(decompositions))
def test_the_exported_file_runs_every_factor_in_integers(
    name, profiled, net, data, tmp_path
) -> None:
    plan = make_plan(profiled, Budget())
    body = get_module(fold_batch_norm(net, data.example()), "body")
    assert decompositions[name].unsupported(body) is None
    full = decompositions[name].full_rank(geometry_of(body))
    plan = plan.replace("body", Option(name, tuple(max(1, r // 2) for r in full), 8))
    artifact = export(
        apply(net, plan), plan, tmp_path / "m.onnx", TARGET, calibration=data.calibration
    )
    check = verify(artifact, net, data.test)
    assert check.passed, check.failures
    assert check.integer_macs_fraction == 1.0
