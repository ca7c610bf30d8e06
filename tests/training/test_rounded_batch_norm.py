"""Batch norm that stays in a quantised network keeps its statistics while it is trained."""

import pytest
import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.models.inspect import inspect
from sft.surgery.apply import apply
from sft.training.finetune import finetune


class Late(nn.Module):
    """Batch norm behind an addition, and two that read one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.first, self.second = (nn.BatchNorm2d(8) for _ in range(3))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        x = torch.relu(self.first(x) + self.second(x))
        x = torch.relu(self.norm(self.two(x) + x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.slow  # torchao looks for patterns of batch norm in the graph for many seconds
def test_a_batch_norm_that_cannot_be_folded_keeps_its_statistics(data) -> None:
    torch.manual_seed(0)
    model = Late()
    for batch, _ in data.train:
        model(batch)
    model.eval()
    nothing = Cost(1, 1, 1)
    rows = tuple(
        PlanRow(layer.name, Option("dense", (), 8), 0.0, nothing, "test")
        for layer in inspect(model, data.example(), "m").layers
    )
    plan = Plan(
        "m", "onnxruntime", {}, rows, nothing, nothing, "optimal", 0, 0, 0, input_shape=(1, 12, 12)
    )
    rounded = quantize(apply(model, plan), plan, "onnxruntime", data.calibration)
    statistics = {k: v.clone() for k, v in rounded.named_buffers() if "running" in k}
    assert len(statistics) == 6
    x = data.validation.inputs
    assert torch.equal(rounded(x)[:3], rounded(x[:3]))  # no statistics of the batch
    tuned = finetune(rounded, data.train, model, steps=4, learning_rate=1e-3)
    assert all(torch.equal(v, dict(tuned.named_buffers())[k]) for k, v in statistics.items())
    assert torch.equal(tuned(x)[:3], tuned(x[:3]))
    torch.testing.assert_close(tuned.convert()(x), tuned(x), rtol=1e-5, atol=1e-5)
