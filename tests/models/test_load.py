import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sft.core.errors import InputError
from sft.models.load import load_model, only_tensors

SOURCE = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()

def half():
    return small().half()

def broken():
    raise RuntimeError("no such file\\non the second line")

def number():
    return 3

def unbuilt():
    return nn.Flatten

constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a module of factories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft_test_models.py").write_text(SOURCE)
    return tmp_path


def weights(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_a_factory_in_the_current_directory(here: Path) -> None:
    import sys

    path = list(sys.path)
    model = load_model("sft_test_models:small")
    assert isinstance(model[0], nn.Conv2d)  # type: ignore[index]
    assert not any(m.training for m in model.modules())
    assert sys.path == path


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("sft_test_nowhere:small", "there is no module 'sft_test_nowhere'"),
        ("sft_test_models:smal", "has no 'smal'. Did you mean 'small'"),
        ("sft_test_models:constant", "is of type int"),
        ("sft_test_models:broken", "RuntimeError: no such file on the second line"),
        ("sft_test_models:number", "returned int"),
        ("sft_test_models:unbuilt", "returned type"),
        ("sft_test_models:", "is not of the form package.module:name"),
        ("fashion-resnt", "Did you mean 'fashion-resnet'"),
        ("resnet18", "Known forms: .*timm:NAME.*torchvision:NAME.*model.pt2"),
        ("weights.safetensors", "with --weights"),
        ("nowhere.pt2", "Cannot read 'nowhere.pt2'"),
    ],
)
def test_references_that_do_not_work(here: Path, reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(reference)


def test_an_import_that_fails_inside_the_module_is_quoted(here: Path) -> None:
    (here / "sft_test_needs.py").write_text("import sft_test_missing_package\n")
    with pytest.raises(InputError, match=r"'sft_test_needs' failed: ModuleNotFound.*miss"):
        load_model("sft_test_needs:small")
    (here / "sft_test_syntax.py").write_text("def f(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        load_model("sft_test_syntax:small")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_a_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.models", None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        load_model(f"{package}:resnet18")


def test_a_model_of_timm_is_trained_unless_weights_are_given(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    asked = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        if name == "tinny":
            raise RuntimeError("Unknown model (tinny)")
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    fake = types.SimpleNamespace(create_model=create_model, list_models=lambda: ["tiny"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    save_file(weights(), "w.safetensors")
    load_model("timm:tiny")
    load_model("timm:tiny", "w.safetensors")
    assert asked == [("tiny", True), ("tiny", False)]
    with pytest.raises(InputError, match=r"Unknown model \(tinny\)\. Did you mean 'tiny'"):
        load_model("timm:tinny")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pth"])
def test_weights_files(here: Path, name: str) -> None:
    stored = weights()
    if name.endswith(".safetensors"):
        save_file(stored, name)
    else:
        torch.save({"state_dict": stored, "epoch": 3} if "wrapped" in name else stored, name)
    model = load_model("sft_test_models:small", name)
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("reference", "dtype"),
    [("sft_test_models:small", torch.float32), ("sft_test_models:half", torch.float16)],
)
def test_weights_take_the_dtype_of_the_model(
    here: Path, reference: str, dtype: torch.dtype
) -> None:
    stored = {k: v.half() if v.is_floating_point() else v for k, v in weights().items()}
    save_file(stored, "w.safetensors")
    state = load_model(reference, "w.safetensors").state_dict()
    assert state["0.weight"].dtype == dtype
    assert torch.equal(state["0.weight"], stored["0.weight"].to(dtype))


def test_weights_that_do_not_fit(here: Path) -> None:
    stored = weights()
    stored["0.weight"] = stored["0.weight"][:2].clone()
    stored["extra"] = stored.pop("0.bias")
    save_file(stored, "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_model("sft_test_models:small", "w.safetensors")
    message = str(caught.value)
    assert "it has no 0.bias" in message
    assert "it has an unexpected extra" in message
    assert "0.weight (2, 3, 3, 3) (wanted (4, 3, 3, 3))" in message


def test_only_the_first_few_names_are_listed(here: Path) -> None:
    save_file({"a": torch.ones(1)}, "w.safetensors")
    with pytest.raises(InputError, match=r"it has no 0\.weight, 0\.bias, 1\.weight and 4 more"):
        load_model("sft_test_models:small", "w.safetensors")


class Trap:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open_mark, ("mark",))


def open_mark(name: str) -> None:
    Path(name).write_text("unpickled")


def test_nothing_is_unpickled(here: Path) -> None:
    torch.save({"a": torch.ones(1), "trap": Trap()}, "w.pt")
    with pytest.raises(InputError, match="SFT unpickles nothing"):
        load_model("sft_test_models:small", "w.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"), only_tensors():
        torch.load("w.pt", weights_only=False)
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.safetensors", None, "There is no weights file"),
        ("w.safetensors", b"not safetensors", "is not a safetensors file"),
        ("w.pt", b"not a zip", "damaged"),
        ("w.h5", b"", "are read from .safetensors"),
    ],
)
def test_weights_files_that_cannot_be_read(
    here: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_model("sft_test_models:small", name)


def test_a_file_of_something_else_is_not_a_state_dict(here: Path) -> None:
    torch.save([torch.ones(1)], "w.pt")
    with pytest.raises(InputError, match="is not a state dict"):
        load_model("sft_test_models:small", "w.pt")


def test_only_tensors_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    with only_tensors():
        assert os.environ[name] == "1"
    assert name not in os.environ


def test_the_embedded_network_with_weights_of_its_own(tmp_path: Path) -> None:
    from sft.models.zoo.resnet import FashionResNet

    torch.manual_seed(1)
    state = FashionResNet().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = load_model("fashion-resnet", str(tmp_path / "w.safetensors"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_embedded_network() -> None:
    from sft.core.data import top1
    from sft.models.zoo import fashion_mnist as fm

    model = load_model("fashion-resnet")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    images, labels = fm.load_split("validation")
    x, y = torch.from_numpy(fm.normalise(images[:200])), torch.from_numpy(labels[:200]).long()
    with torch.no_grad():
        assert top1(model, [(x, y)]) > 0.85
