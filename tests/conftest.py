"""A small network and made data that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sft.core.data import Batches, Data
from sft.core.records import Profile
from sft.profiling.profile import profile


class SmallNet(nn.Module):
    """Convolutions with batch norm, a residual addition, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.body_norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.body_norm(self.body(x)) + x)
        x = torch.relu(self.down(x))
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)


def made_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gratings of four directions with noise: ``(count, 1, 12, 12)`` and their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    angle = labels.float() * torch.pi / 4
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    phase = torch.rand(count, 1, 1, generator=generator) * 6.28
    noise = torch.randn(count, 12, 12, generator=generator)
    return (torch.sin(along * 1.3 + phase) + 0.5 * noise)[:, None], labels


def made_data(labelled: bool = True) -> Data:
    """Four splits of made images."""

    def split(count: int, seed: int, shuffle: bool = False) -> Batches:
        x, y = made_images(count, seed)
        return Batches(x, y if labelled else None, 32, shuffle)

    return Data(split(128, 0), split(256, 1, True), split(64, 2), split(64, 3), name="gratings")


def trained_net() -> SmallNet:
    """A `SmallNet` trained for a few steps; the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallNet()
        x, y = made_images(256, 1)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Latencies that tests measure are remembered for the session, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def _trained_state() -> dict[str, torch.Tensor]:
    return trained_net().state_dict()


@pytest.fixture
def net(_trained_state: dict[str, torch.Tensor]) -> SmallNet:
    fresh = SmallNet()
    fresh.load_state_dict(_trained_state)
    return fresh.eval()


@pytest.fixture
def data() -> Data:
    return made_data()


@pytest.fixture(scope="session")
def shared() -> tuple[SmallNet, Data]:
    """A network and its data for fixtures that are made once; tests do not change them."""
    return trained_net(), made_data()


@pytest.fixture(scope="session")
def profiled() -> Profile:
    """A profile of the small network on the made data, without latency."""
    return profile(trained_net(), made_data(), "onnxruntime-avx2", rank_multiple=2)
