"""What is kept of the data, how much of it, and in which layout it passes."""

import pytest
import torch
from torch import nn

from sft.calibration.rounding import FEW, MANY, How, samples_wanted
from sft.calibration.samples import Reservoir, quick_layout
from sft.core.records import DENSE, Cost, Option, Plan, PlanRow
from sft.quantizers.fake import VALUES, thinned
from sft.runtimes.targets import find_target
from sft.surgery.modules import capture
from sft.surgery.quantize import prepare


def test_two_reservoirs_of_one_seed_keep_the_same_samples() -> None:
    inputs, outputs = Reservoir(5, seed=3), Reservoir(5, seed=3)
    for batch in torch.arange(60.0).split(7):
        inputs.add(batch)
        outputs.add(2 * batch)
    assert torch.equal(2 * torch.cat(inputs.batches()), torch.cat(outputs.batches()))
    assert torch.cat(inputs.batches()).tolist() != [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("bits", "how", "wanted"),
    [(8, How(), FEW), (8, How("gptq"), MANY), (4, How(), MANY), (4, How(refit=False), MANY)],
)
def test_few_samples_are_kept_where_they_only_weigh(bits: int, how: How, wanted: int) -> None:
    cost = Cost(1, 1, 1)
    rows = tuple(PlanRow(n, Option(DENSE, (), bits), None, cost, "test") for n in "01")
    target = find_target("onnxruntime-vnni")
    plan = Plan("m", target.name, {}, rows, cost, cost, "edited", 0, 0, 0, input_shape=(4, 6, 6))
    net = nn.Sequential(nn.Conv2d(4, 64, 3), nn.Conv2d(64, 4, 3)).eval()
    assert samples_wanted(prepare(net, plan, target), how) == wanted


def test_the_layout_changes_unless_the_graph_looks_at_memory() -> None:
    class Viewing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0], -1)

    x = torch.randn(2, 3, 4, 4)
    quick = quick_layout(capture(nn.Conv2d(3, 3, 1).eval(), x[:1]))
    assert quick(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(quick(x), x)
    assert quick(x[0]) is not None
    assert quick_layout(capture(Viewing(), x[:1]))(x) is x


def test_thinning_meets_every_channel_in_either_layout() -> None:
    """A step with a factor in common with the channels would see only some of them."""
    channels = 64
    x = torch.arange(float(channels))[None, :, None, None].expand(8, channels, 96, 96)
    for layout in (torch.contiguous_format, torch.channels_last):
        values = thinned(x.contiguous(memory_format=layout))
        assert 8 * VALUES <= len(values) < 3 * 8 * VALUES
        assert values.unique().tolist() == list(range(channels))


def test_slices_of_a_batch_give_what_the_batch_gives() -> None:
    x = torch.randn(6, 8, 24, 24)
    for own in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(6, 5)):
        parts = torch.cat([thinned(own[:1]), thinned(own[1:4]), thinned(own[4:])])
        assert torch.equal(parts.sort().values, thinned(own).sort().values)
