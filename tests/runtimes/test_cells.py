"""Files of single cells: what they compute, and how ONNX Runtime executes them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch.nn import functional

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.layers.chains import CHAINS
from sft.layers.interpolative import interpolative_parts
from sft.runtimes.cell_files import OUTPUT_STEP, STEP, write_cell
from sft.runtimes.cells import Cell, unsupported
from sft.runtimes.runner import Runner
from sft.runtimes.targets import find_target

U8, S8 = (find_target(f"onnxruntime-{name}").layout for name in ("vnni", "arm64"))
CONV = {
    1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d,
}  # fmt: skip
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d}


def conv(inputs: int, outputs: int, *kernel: int, **more: Any) -> Geometry:
    """A geometry with unit stride and dilation and "same" padding unless told otherwise."""
    ones = (1,) * len(kernel)
    return Geometry(
        inputs, outputs, kernel, **{"stride": ones, "padding": "same", "dilation": ones, **more}
    )


DENSE = conv(16, 24, 3, 3)
UP = conv(16, 8, 3, 3, transposed=True, stride=(2, 2), padding=(1, 1), output_padding=(1, 1))
SPLIT = CHAINS["channel_out"](DENSE, (8,))
KINDS = {
    "conv1d": Cell((conv(8, 16, 3, stride=(2,), padding=(1,)),), (20,)),
    "conv2d": Cell((DENSE,), (9, 7)),
    "conv3d": Cell((conv(4, 8, 3, 3, 3),), (5, 4, 6)),
    "even": Cell((conv(8, 8, 4, 2),), (9, 9)),
    "dilated": Cell((conv(8, 8, 3, 3, dilation=(2, 2), padding=(2, 2)),), (9, 9)),
    "grouped": Cell((conv(16, 16, 3, 3, groups=4),), (8, 8)),
    "depthwise": Cell((conv(16, 16, 3, 3, groups=16),), (8, 8)),
    "linear": Cell((Geometry(32, 24),)),
    "sequence": Cell((Geometry(32, 24),), (5,)),
    "split linear": Cell((Geometry(32, 8), Geometry(8, 24)), (5,)),
    "no bias": Cell((DENSE,), (9, 7), bias=False),
    **{name: Cell(CHAINS[name](DENSE, (8,)), (9, 7)) for name in CHAINS if name != "tucker2"},
    "tucker2": Cell(CHAINS["tucker2"](DENSE, (8, 8)), (9, 7)),
    "residual": Cell((DENSE, *SPLIT), (9, 7), structure="residual"),
    "interpolative": Cell(interpolative_parts(DENSE, (8,)), (9, 7), structure="interpolative"),
    "ordered": Cell(interpolative_parts(DENSE, (24,)), (9, 7), structure="interpolative"),
}
Rerun = Callable[[bytes], Runner]


@pytest.fixture(scope="module")
def rerun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rerun]:
    """One child for all files of this module."""
    path = tmp_path_factory.mktemp("cells") / "cell.onnx"
    runners: list[Runner] = []

    def load(content: bytes) -> Runner:
        path.write_bytes(content)
        if runners:
            runners[0].load(path)
        else:
            runners.append(Runner(path, "onnxruntime"))
        return runners[0]

    yield load
    for runner in runners:
        runner.close()


def output(content: bytes, x: Any) -> Any:
    return onnxruntime.InferenceSession(content).run(None, {"x": x})[0]


def constants(content: bytes) -> list[torch.Tensor]:
    """The constants of a file in their order: of one copy, those of the factors in theirs."""
    found = [numpy_helper.to_array(t) for t in onnx.load_from_string(content).graph.initializer]
    return [torch.from_numpy(values.copy()) for values in found]


def apply(x: torch.Tensor, geometry: Geometry, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    """One factor by torch."""
    if not geometry.axes:
        return functional.linear(x, weight, bias)
    if geometry.transposed:
        more = (geometry.stride, geometry.padding, geometry.output_padding, geometry.groups)
        return TRANSPOSED[geometry.axes](x, weight, bias, *more, geometry.dilation)
    more = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return CONV[geometry.axes](x, weight, bias, *more)


@pytest.mark.parametrize("arithmetic", ["integer", "float", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_runs_in_its_arithmetic(kind: str, arithmetic: str, rerun: Rerun) -> None:
    cell = dataclasses.replace(KINDS[kind], arithmetic=arithmetic)
    for copies in (1, 3):
        kernels = rerun(write_cell(cell, U8, copies)).place()
        assert {k.integer for k in kernels} == {arithmetic == "integer"}
        assert sum(k.macs for k in kernels) == copies * cell.macs


@pytest.mark.parametrize("arithmetic", ["float", "mixed"])
def test_transposed_runs_in_float(arithmetic: str, rerun: Rerun) -> None:
    cell = Cell((UP,), (6, 5), arithmetic)
    (kernel,) = rerun(write_cell(cell, U8)).place()
    assert (kernel.integer, kernel.macs) == (False, UP.macs((6, 5)))


def test_signed_activations_are_the_unsigned_ones_less_128() -> None:
    x = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 16), np.uint8)
    unsigned = output(write_cell(KINDS["conv2d"], U8), x)
    signed = output(write_cell(KINDS["conv2d"], S8), (x.astype(int) - 128).astype(np.int8))
    assert signed.dtype == np.int8
    assert np.abs(signed.astype(int) - (unsigned.astype(int) - 128)).max() <= 1


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, tuple[int, ...]]:
    axes = draw(st.integers(1, 3))
    some = st.integers(1, 3)

    def sizes() -> tuple[int, ...]:
        return tuple(draw(some) for _ in range(axes))

    groups = draw(some)
    stride = sizes() if (strided := draw(st.booleans())) else (1,) * axes
    padding = sizes() if strided or draw(st.booleans()) else "same"
    channels = (groups * draw(some), groups * draw(some))
    found = Geometry(*channels, sizes(), stride, padding, sizes(), groups)
    return found, tuple(draw(st.integers(7, 9)) for _ in range(axes))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(geometries(), st.booleans(), st.sampled_from([None, "relu", "relu6"]))
@settings(max_examples=40, deadline=None)
def test_float_cell_is_torch_s(
    drawn: tuple[Geometry, tuple[int, ...]], bias: bool, activation: str | None
) -> None:
    geometry, size = drawn
    content = write_cell(Cell((geometry,), size, "float", bias, activation), U8)
    x = torch.randn(1, geometry.inputs, *size, generator=torch.Generator().manual_seed(0))
    numbers = [c for c in constants(content) if c.ndim]
    weight, b = (numbers[1], numbers[0]) if bias else (numbers[0], None)
    want = apply(4 * x, geometry, weight, b)
    after = {"relu": torch.relu, "relu6": functional.relu6}
    want = after[activation](want) if activation else want
    assert tuple(want.shape[2:]) == geometry.output_size(size)
    np.testing.assert_allclose(output(content, (4 * x).numpy()), want, rtol=0, atol=1e-4)


def test_float_structures_are_torch_s() -> None:
    x = torch.randn(1, 16, 9, 7, generator=torch.Generator().manual_seed(0))

    def numbers(name: str) -> tuple[bytes, list[torch.Tensor]]:
        content = write_cell(dataclasses.replace(KINDS[name], arithmetic="float"), U8)
        return content, constants(content)

    content, (dense, first, bias, second) = numbers("residual")
    want = apply(x, DENSE, dense, None)
    want += apply(apply(x, SPLIT[0], first, None), SPLIT[1], second, bias)
    np.testing.assert_allclose(output(content, x.numpy()), want, rtol=0, atol=1e-4)

    content, (bias, first, later, second, order) = numbers("interpolative")
    parts = KINDS["interpolative"].chain
    y = apply(x, parts[0], first, bias)
    want = torch.cat([y, apply(y, parts[1], second, later)], 1)[:, order]
    np.testing.assert_allclose(output(content, x.numpy()), want, rtol=0, atol=1e-4)

    content = write_cell(Cell((UP,), (9, 7), "float"), U8)
    bias, weight = constants(content)
    want = apply(x, UP, weight, bias)
    assert tuple(want.shape[2:]) == UP.output_size((9, 7)) == (18, 14)
    np.testing.assert_allclose(output(content, x.numpy()), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ["integer", "mixed"])
def test_integers_in_and_out_stand_for_the_convolution(arithmetic: str) -> None:
    cell = Cell((DENSE,), (9, 7), arithmetic)
    content = write_cell(cell, U8)
    drawn = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 16), np.uint8)
    given_x = np.concatenate([drawn, drawn[:, ::-1]], 1) if arithmetic == "mixed" else drawn
    found = {tuple(c.shape): c for c in constants(content) if c.dtype != torch.int64 and c.ndim}
    weight = found[DENSE.weight_shape].float()
    if arithmetic == "integer":
        channels = [c for c in constants(content) if c.dtype == torch.float32 and c.ndim]
        bias, scale = channels
        weight = weight * scale[:, None, None, None]
    else:
        bias = found[(24,)]
    x = (torch.from_numpy(drawn).permute(0, 3, 1, 2).float() - 128) * STEP
    levels = (apply(x, DENSE, weight, bias) / OUTPUT_STEP + 128).permute(0, 2, 3, 1)
    got = output(content, given_x)
    assert got.dtype == np.uint8
    assert got.shape == (1, 9, 7, 24)
    assert got.std() > 10  # the comparison has something to compare
    assert np.abs(got - levels.clamp(0, 255).numpy()).max() < 0.51


def test_copies_differ_in_their_weights() -> None:
    one, two = (constants(write_cell(KINDS["conv2d"], U8, copies)) for copies in (1, 2))
    weights = [c for c in two if tuple(c.shape) == DENSE.weight_shape]
    assert len(weights) == 2
    assert not torch.equal(*weights)
    assert sum(tuple(c.shape) == DENSE.weight_shape for c in one) == 1
    assert write_cell(KINDS["conv2d"], U8, 2) == write_cell(KINDS["conv2d"], U8, 2)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Cell((conv(4, 4, 3, 3, padding_mode="reflect"),), (8, 8)), "reflect"),
        (Cell((UP,), (8, 8)), "stays float"),
        (Cell((DENSE,), (8,)), "other axes"),
        (Cell((Geometry(4, 4, groups=2),)), "no groups"),
        (Cell((Geometry(2**15, 2**14),)), "one ONNX file"),
    ],
)
def test_what_cannot_be_written_says_why(cell: Cell, reason: str) -> None:
    assert reason in (unsupported(cell) or "")
    with pytest.raises(InputError, match=reason):
        write_cell(cell, U8)


def test_wrong_cells_are_refused() -> None:
    with pytest.raises(InputError, match="arithmetic='int4'"):
        Cell((DENSE,), (8, 8), "int4")
    with pytest.raises(InputError, match="activation='gelu'"):
        Cell((DENSE,), (8, 8), activation="gelu")
    with pytest.raises(InputError, match="2 factors cannot be 'residual'"):
        Cell(SPLIT, (8, 8), structure="residual")
    with pytest.raises(InputError, match="cannot be 'tree'"):
        Cell(SPLIT, (8, 8), structure="tree")


def test_saturation_rectifies_integers() -> None:
    assert Cell((DENSE,), (8, 8), activation="relu") == Cell((DENSE,), (8, 8))
    assert Cell((DENSE,), (8, 8), "float", activation="relu").activation == "relu"


def test_a_child_takes_one_file_after_another(tmp_path: Path) -> None:
    paths = []
    for name in ("conv2d", "linear"):
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(write_cell(dataclasses.replace(KINDS[name], arithmetic="float"), U8))
    with Runner(paths[0], "onnxruntime") as runner:
        child = runner.pid
        assert runner.run(np.zeros((1, 16, 9, 7), np.float32)).shape == (1, 24, 9, 7)
        runner.load(paths[1])
        assert runner.pid == child
        assert runner.time(2)  # the sample of the first file would not fit
        assert runner.run(np.zeros((1, 32), np.float32)).shape == (1, 24)
        with pytest.raises(InputError, match="no such file"):
            runner.load(tmp_path / "absent.onnx")
