"""Blocks of a graph, and integers learned block by block."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sft
from sft.calibration.blocks import BlockFit, reconstruct_blocks
from sft.calibration.pieces import Runner, cut
from sft.calibration.quantize import set_ranges
from sft.calibration.rounding import How, round_weights
from sft.core.errors import InputError
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.models.inspect import inspect
from sft.quantizers.fake import Mode, in_kernel_order
from sft.quantizers.grid import offending_pairs
from sft.quantizers.ranges import ranges
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel, prepare

Floats = dict[str, Tensor]


class Plain(nn.Module):
    """Convolution, pooling and a view that needs the size of the batch; two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Linear(100, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.two(torch.relu(self.one(y.view(x.shape[0], -1))))


class Branches(nn.Module):
    """Three parallel branches that are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.long1, self.long2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        long = torch.relu(self.long2(torch.relu(self.long1(x))))
        pooled = nn.functional.max_pool2d(x, 3, 1, 1)
        return self.head(torch.cat([torch.relu(self.short(x)), long, pooled], 1)).mean((2, 3))


class Twice(nn.Module):
    """A linear layer that is used twice, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.same, self.two = nn.Linear(144, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x.flatten(1)))
        return self.two(self.same(self.same(y)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def images(data: sft.Data, count: int = 80) -> Tensor:
    return torch.cat([b[0] if isinstance(b, tuple | list) else b for b in data.calibration])[:count]


def rounded(net: nn.Module, x: Tensor, bits: int, target: str) -> tuple[QuantizedModel, Floats]:
    """The network rounded by GPTQ alone, without refit, and its parameters before."""
    zero = Cost(1, 1, 1)
    rows = tuple(
        PlanRow(layer.name, Option("dense", (), bits), 0.0, zero, "test")
        for layer in inspect(net, x[:1], "net").layers
    )
    plan = Plan(
        "net", target, {}, rows, zero, zero, "optimal", 0, 0, 0, input_shape=tuple(x.shape[1:])
    )
    model = prepare(apply(net, plan), plan, find_target(target))
    model.set_modes(Mode.OBSERVE, Mode.PASS)
    with torch.no_grad():
        model(x)
    set_ranges(model, ranges["mse"])
    model.set_modes(Mode.ROUND, Mode.ROUND)
    floats = {n: p.detach().clone() for n, p in model.graph_module.named_parameters()}
    round_weights(model, list(x.split(32)), How(refit=False))
    return model, floats


def learned(
    net: nn.Module, x: Tensor, bits: int = 3, target: str = "onnxruntime-avx2", **options: float
) -> tuple[QuantizedModel, list[BlockFit]]:
    model, floats = rounded(net, x, bits, target)
    given = {"steps": 30, "learning_rate": 0.1, **options}
    return model, reconstruct_blocks(model, list(x.split(32)), floats, **given)  # type: ignore[arg-type]


def state(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.graph_module.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Plain, [("conv.weight",), ("one.weight",), ("two.weight",)]),
        (
            Branches,
            [("stem.weight",), ("short.weight", "long1.weight", "long2.weight"), ("head.weight",)],
        ),
        (Twice, [("one.weight",), ("two.weight",)]),
    ],
)
def test_blocks_keep_branches_whole(
    build: Callable[[], nn.Module], expected: list[tuple[str, ...]], data: sft.Data
) -> None:
    model, _ = rounded(seeded(build), images(data), 3, "onnxruntime-avx2")
    assert [piece.weights for piece in cut(model)] == expected


def test_a_residual_block_is_whole(net: nn.Module, data: sft.Data) -> None:
    model, _ = rounded(net, images(data), 3, "onnxruntime-avx2")
    pieces = cut(model)
    assert [p.weights for p in pieces] == [
        ("stem.weight",),
        ("body.weight",),
        ("down.weight",),
        ("fc.weight",),
    ]
    targets = [str(node.target) for node in pieces[1].nodes]
    assert "aten.add.Tensor" in targets
    assert "aten.adaptive_avg_pool2d.default" in [str(n.target) for n in pieces[3].nodes]


@pytest.mark.parametrize("build", [Plain, Branches, Twice])
def test_pieces_one_after_another_are_the_network(
    build: Callable[[], nn.Module], data: sft.Data
) -> None:
    x = images(data, 7)
    model, _ = rounded(seeded(build), x, 3, "onnxruntime-avx2")
    runner = Runner(model.graph_module, {}, lambda module, value: module(value))
    pieces = cut(model)
    with torch.no_grad():
        y = x
        for before, piece in zip([None, *pieces], pieces, strict=False):
            assert before is None or piece.source is before.last
            y = runner.run_piece(piece, y)
        wanted = model(x)
    if build is Branches:
        y = y.mean((2, 3))  # behind the last block
        assert torch.allclose(y, wanted, atol=float(model_step(model)))
    else:
        assert torch.equal(y, wanted)


def model_step(model: QuantizedModel) -> Tensor:
    return max(a.scale for a in model.activations().values())


def test_a_shared_scale_is_learned_once(data: sft.Data) -> None:
    model, _ = rounded(seeded(Plain), images(data), 3, "onnxruntime-avx2")
    names = [name for piece in cut(model) for name in piece.activations]
    assert len(names) == len(set(names))
    assert set(names) <= set(model.activations())


@pytest.mark.parametrize("bits", [2, 3])
def test_it_improves_on_gptq(net: nn.Module, data: sft.Data, bits: int) -> None:
    x = images(data)
    fresh = torch.cat([b[0] for b in data.test])  # type: ignore[misc]
    before, _ = rounded(net, x, bits, "onnxruntime-avx2")
    after, _ = learned(net, x, bits)
    with torch.no_grad():
        wanted = net(fresh)
        errors = [(m(fresh) - wanted).square().sum() for m in (before, after)]
    assert errors[1] < 0.7 * errors[0]


def test_nothing_is_kept_that_is_not_better(net: nn.Module, data: sft.Data) -> None:
    x = images(data)
    before = state(rounded(net, x, 3, "onnxruntime-avx2")[0])
    model, fits = learned(net, x, learning_rate=3.0, step_rate=1.0, steps=5)  # ruins what it learns
    assert all(fit.kept == (fit.after < fit.before) for fit in fits)
    assert any(not fit.kept for fit in fits)
    for piece, fit in zip(cut(model), fits, strict=True):
        same = all(
            torch.equal(state(model)[n], before[n])
            for n in [*piece.weights, *(f"{a}.scale" for a in piece.activations)]
        )
        assert same == (not fit.kept)


def test_the_reported_error_is_that_of_the_model(net: nn.Module, data: sft.Data) -> None:
    x = images(data)
    model, fits = learned(net, x)
    held = x[::5]
    with torch.no_grad():
        wanted = net(held)
        error = (model(held) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    last = fits[-1].after if fits[-1].kept else fits[-1].before
    assert float(error) == pytest.approx(last, rel=1e-2)


@pytest.mark.parametrize(
    ("target", "bits"), [("onnxruntime-avx2", 2), ("onnxruntime-avx2", 8), ("onnxruntime-vnni", 3)]
)
def test_weights_end_on_their_grid(net: nn.Module, data: sft.Data, target: str, bits: int) -> None:
    model, fits = learned(net, images(data), bits, target)
    assert bits == 8 or any(fit.kept for fit in fits)
    for weight, rounding in model.weights().values():
        integers = rounding.integers(weight)
        assert torch.equal(rounding.on_grid(weight), weight)
        assert int(integers.abs().max()) <= rounding.quant_max
        assert rounding.mode is Mode.ROUND
        assert not isinstance(rounding.scale, nn.Parameter)
        if rounding.pair_sum is not None:
            assert offending_pairs(in_kernel_order(integers), rounding.pair_sum) == 0
    for activation in model.activations().values():
        assert activation.mode is Mode.ROUND
        assert float(activation.scale) > 0
        assert not isinstance(activation.scale, nn.Parameter)
    assert all(p.grad is None for p in model.parameters())


def test_a_seed_decides_and_each_option_counts(data: sft.Data) -> None:
    x, net = images(data, 64), seeded(Plain)
    torch.manual_seed(1)
    model, fits = learned(net, x)
    torch.manual_seed(2)
    again, same = learned(net, x)
    assert same == fits
    assert all(torch.equal(value, state(again)[name]) for name, value in state(model).items())
    others: list[dict[str, float]] = [
        {"seed": 1},
        {"steps": 45},
        {"learning_rate": 0.05},
        {"step_rate": 1e-2},
        {"drop": 0.0},
    ]
    for option in others:
        moved = learned(net, x, **option)[1]
        assert [fit.after for fit in moved] != [fit.after for fit in fits], option


def test_the_converted_graph_is_the_simulation(net: nn.Module, data: sft.Data) -> None:
    x = images(data)
    model, fits = learned(net, x)
    assert any(fit.kept for fit in fits)
    with torch.no_grad():
        assert torch.allclose(model.convert()(x), model(x), rtol=1e-4, atol=1e-4)


def test_biases_and_inputs_are_left_alone(net: nn.Module, data: sft.Data) -> None:
    x = images(data)
    model, floats = rounded(net, x, 3, "onnxruntime-avx2")
    before, kept, inputs = state(model), {n: v.clone() for n, v in floats.items()}, x.clone()
    fits = reconstruct_blocks(model, list(x.split(32)), floats, steps=30, learning_rate=0.1)
    assert any(fit.kept for fit in fits)
    assert torch.equal(x, inputs)
    assert all(torch.equal(floats[n], kept[n]) for n in floats)
    own = set(model.weights())
    for name, value in model.graph_module.named_parameters():
        assert name in own or torch.equal(value, before[name])


def test_a_weight_with_two_users_stays(data: sft.Data) -> None:
    x = images(data)
    net = seeded(Twice)
    before = state(rounded(net, x, 3, "onnxruntime-avx2")[0])["same.weight"]
    assert torch.equal(state(learned(net, x)[0])["same.weight"], before)


def test_errors_say_what_to_give(net: nn.Module, data: sft.Data) -> None:
    x = images(data)
    model, floats = rounded(net, x, 3, "onnxruntime-avx2")
    with pytest.raises(InputError, match="two samples"):
        reconstruct_blocks(model, [x[:1]], floats)
    with pytest.raises(InputError, match="two samples"):
        reconstruct_blocks(model, [], floats)
    with pytest.raises(InputError, match=r"stem\.bias"):
        reconstruct_blocks(model, [x], {n: v for n, v in floats.items() if n != "stem.bias"})
    with pytest.raises(InputError, match="probability"):
        reconstruct_blocks(model, [x], floats, drop=1.5)
    next(iter(model.weights().values()))[1].frozen = False
    with pytest.raises(InputError, match="no fixed scale"):
        reconstruct_blocks(model, [x], floats)


def test_the_verb_reconstructs_on_request(net: nn.Module, data: sft.Data) -> None:
    """The verb does what `round_weights` and then `reconstruct_blocks` do, with biases in float."""
    plan = rounded(net, images(data), 3, "onnxruntime-avx2")[0].plan
    small = apply(net, plan)
    off = sft.quantize(small, plan, plan.target, data.calibration, refit=False)
    on = sft.quantize(small, plan, plan.target, data.calibration, refit=False, reconstruct=90)
    floats = {n: p.detach() for n, p in prepare_floats(small, plan).items()}
    kept = [b[0] for b in data.calibration]  # type: ignore[misc]
    fits = reconstruct_blocks(off, kept, floats, steps=90)
    assert any(fit.kept for fit in fits)
    one, other = state(off), state(on)
    assert all(torch.equal(one[name], other[name]) for name in one)


def prepare_floats(small: nn.Module, plan: Plan) -> Floats:
    model = prepare(small, plan, find_target(plan.target))
    return dict(model.graph_module.named_parameters())


def test_a_fit_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockFit("a", "b", 1.0, 0.5, True).kept = False  # type: ignore[misc]
