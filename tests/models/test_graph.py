import copy
import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.core.errors import InputError
from sft.models.graph import module_tree
from sft.models.inspect import inspect
from sft.models.load import load_model
from sft.models.zoo.resnet import FashionResNet


class Mixed(nn.Module):
    """Every kind of operator that becomes a module again, and some that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=(2, 1), padding="valid", bias=False),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular"),
            nn.BatchNorm2d(8, affine=False),
            nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2),
            nn.Conv2d(6, 6, 3, padding="same", dilation=2),
            nn.Dropout(0.5),
        )
        self.line = nn.Conv1d(6, 4, 3)
        self.line_norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.used = nn.Linear(5, 5)
        self.free = nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean(2)
        x = self.fc(self.line_norm(self.line(x)).mean(2))
        x = self.twice(torch.relu(self.twice(x)))
        x = self.used(x) + self.used.weight.sum()
        return torch.cat([functional.linear(x, self.free).flatten(1), x.flatten(1)], 1)


def settled(net: nn.Module) -> nn.Module:
    """Batch norms with statistics that are not the initial ones, in eval mode."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def stored(net: nn.Module, example: Tensor, path: Path) -> nn.Module:
    torch.export.save(torch.export.export(net, (example,)), path)
    return load_model(str(path))


def test_the_embedded_network_comes_back_with_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, example = settled(FashionResNet()), torch.randn(1, 1, 28, 28)
    tree = stored(net, example, tmp_path / "model.pt2")
    x = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        assert (tree(x) - net(x)).abs().max() <= 1e-6 * net(x).abs().max()
    assert inspect(tree, example).layers == inspect(net, example).layers
    assert isinstance(tree.get_submodule("stages.1.0.shortcut.0"), nn.Conv2d)
    assert isinstance(tree.get_submodule("stages.0.1.bn2"), nn.BatchNorm2d)
    assert not any(m.training for m in tree.modules())
    state = net.state_dict()
    assert set(tree.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in tree.state_dict().items())


def test_every_kind_of_operator() -> None:
    torch.manual_seed(0)
    net, example = settled(Mixed()), torch.randn(2, 3, 12, 12)
    tree = module_tree(torch.export.export(net, (example,)))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        got, wanted = tree(x), net(x)
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    original, found = inspect(net, example), inspect(tree, example)
    by_name = {layer.name: layer for layer in found.layers}
    assert "used" not in by_name  # its weight is read elsewhere too, so it stays an operator
    assert by_name["twice"].calls == 2
    wanted_layers = {x.name: x for x in original.layers if x.name != "used"}
    assert {k: v.macs for k, v in by_name.items()} == {k: v.macs for k, v in wanted_layers.items()}
    assert {k: v.kind for k, v in by_name.items()} == {k: v.kind for k, v in wanted_layers.items()}
    assert tree.get_submodule("body.1").eps == 1e-3
    assert isinstance(tree.get_submodule("line_norm"), nn.BatchNorm1d)
    assert found.macs == original.macs


def test_a_layer_can_be_replaced_by_name() -> None:
    torch.manual_seed(0)
    net, example = settled(FashionResNet()), torch.randn(1, 1, 28, 28)
    tree = module_tree(torch.export.export(net, (example,)))
    other = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    for model in (tree, net):
        model.set_submodule("stages.1.1.conv1", other)
    with torch.no_grad():
        assert torch.equal(tree(example), net(example))


def test_the_tree_can_be_copied_trained_and_exported_again() -> None:
    torch.manual_seed(0)
    net, example = settled(FashionResNet()), torch.randn(1, 1, 28, 28)
    tree = copy.deepcopy(module_tree(torch.export.export(net, (example,))))
    again = torch.export.export(tree, (example,)).module()
    with torch.no_grad():
        assert torch.equal(again(example), net(example))
    before = tree.get_buffer("bn.running_mean").clone()
    tree.train()(torch.randn(1, 1, 28, 28)).sum().backward()
    assert tree.get_parameter("conv.weight").grad is not None
    assert not torch.equal(tree.get_buffer("bn.running_mean"), before)
    assert not torch.equal(net.bn.running_mean, tree.get_buffer("bn.running_mean"))


def test_a_batch_axis_that_was_left_open_stays_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = settled(FashionResNet())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    tree, x = load_model(str(tmp_path / "model.pt2")), torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        assert (tree(x) - net(x)).abs().max() <= 1e-6 * net(x).abs().max()


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    net, x = Tied().eval(), torch.randn(1, 3, 8, 8)
    tree = module_tree(torch.export.export(net, (x,)))
    with torch.no_grad():
        assert torch.equal(tree(x), net(x))
    assert len(list(tree.parameters())) == 3


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Dropout(0.5)])
def test_a_program_of_training_mode_is_refused(layer: nn.Module) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 3, 3), layer).train(), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"'mine\.pt2' was exported in training mode"):
        module_tree(torch.export.export(net, (x,)), "mine.pt2")


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not a zip file")
    with pytest.raises(InputError, match=r"is not a file of this torch's torch.export.save"):
        load_model(str(path))
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"is not a file of this torch's torch.export.save"):
        load_model(str(path))


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (_mark, (str(self.mark), "unpickled"))


def _mark(path: str, text: str) -> None:
    Path(path).write_text(text)


def _with_record(path: Path, name: str, content: bytes) -> None:
    """Write the archive again with one record replaced or added."""
    with zipfile.ZipFile(path) as old:
        records = {n: old.read(n) for n in old.namelist()}
    root = next(iter(records)).split("/")[0]
    records[f"{root}/{name}"] = content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for record, value in records.items():
            new.writestr(record, value)


@pytest.mark.parametrize("record", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0"])
def test_nothing_in_a_program_is_unpickled(tmp_path: Path, record: str) -> None:
    path, mark = tmp_path / "model.pt2", tmp_path / "mark"
    x = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(nn.Sequential(nn.Conv2d(3, 3, 3)).eval(), (x,)), path)
    buffer = io.BytesIO()
    torch.save(((x,), {"trap": Trap(mark)}), buffer)
    _with_record(path, record, buffer.getvalue())
    with pytest.raises(InputError, match=r"cannot be loaded|holds pickled objects"):
        load_model(str(path))
    assert not mark.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert mark.exists()  # the trap does work where it is not guarded against
