"""The loss compares what layers gave, on the right device, and names what cannot be compared."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from sft.core import distributed, shards
from sft.core.data import Batches
from sft.core.errors import InputError
from sft.core.shards import Shard
from sft.decompositions import factorize
from sft.training.objective import Objective, name_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_are_compared_before_what_follows_works_in_place(inplace) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace))
    student = copy.deepcopy(teacher)
    student[0] = factorize(teacher[0], "channel_in", 1)
    x = torch.randn(4, 3, 6, 6)
    own, wanted = student[0](x), teacher[0](x)
    distance = (own - wanted).square().mean() / wanted.var()
    outputs = functional.mse_loss(own.relu(), wanted.relu()) / wanted.relu().var(correction=0)
    objective = Objective(student, teacher, CPU, feature_weight=2.0)
    with objective.watching():
        found = objective(x, remaining=0.5)
    torch.testing.assert_close(found, outputs + 2.0 * 0.5 * distance)


def test_a_module_that_a_batch_does_not_call_is_not_compared() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if len(x) > 2 else self.b(x)

    torch.manual_seed(0)
    objective = Objective(Sometimes(), Sometimes(), CPU, match=["*"])
    with objective.watching():
        objective(torch.randn(3, 4)).backward()
        x = torch.randn(2, 4)
        found = objective(x)
        found.backward()  # the graph of the first is gone
    objective.feature_weight = 0.0
    outputs = objective(x)  # nothing is watched any more
    own, wanted = (network.b(x) for network in (objective.student, objective.teacher))
    features = (own - wanted).square().mean() / wanted.var()
    torch.testing.assert_close(found, outputs + features)


def test_what_cannot_be_matched_is_named() -> None:
    torch.manual_seed(0)
    recurrent = nn.ModuleDict({"r": nn.LSTM(3, 2)})
    recurrent.forward = lambda x: recurrent["r"](x)[0]
    objective = Objective(recurrent, copy.deepcopy(recurrent), CPU, match=["r"])
    with objective.watching(), pytest.raises(InputError, match=r"'r' \(LSTM\) gives a tuple"):
        objective(torch.randn(2, 5, 3))
    wide, narrow = (nn.Sequential(nn.Linear(3, n), nn.Linear(n, 2)) for n in (4, 5))
    objective = Objective(wide, narrow, CPU, match=["0"])
    words = r"'0' gives \(6, 4\) in the network and \(6, 5\) in its teacher"
    with objective.watching(), pytest.raises(InputError, match=words):
        objective(torch.randn(6, 3))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"temperature": -4}, {"feature_weight": -1.0},
              {"loss_weight": float("inf")}]
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(wrong) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(InputError, match=next(iter(wrong))):
        Objective(net, net, CPU, **wrong)


def test_dense_targets_are_classes_of_positions() -> None:
    torch.manual_seed(0)
    net, x = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 6)
    targets = torch.randint(5, (2, 4, 6))
    found = Objective(net, None, CPU)((x, targets))
    torch.testing.assert_close(found, functional.cross_entropy(net(x), targets))
    column = torch.randint(5, (2, 1))
    flat = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = Objective(flat, None, CPU)((x, column))
    torch.testing.assert_close(found, functional.cross_entropy(flat(x), column[:, 0]))


def test_the_targets_of_a_loss_are_on_the_device_of_the_outputs() -> None:
    x, seen = torch.randn(2, 3), []

    def loss(outputs, targets):
        seen.append((targets["boxes"][0].device.type, targets["name"]))
        return outputs.sum()

    net = nn.Linear(3, 2, device="meta")
    targets = {"boxes": [torch.zeros(1)], "name": "a"}
    Objective(net, None, torch.device("meta"), loss=loss)._task(net(x.to("meta")), (x, targets))
    assert seen == [("meta", "a")]


class Weighted:
    def __call__(self, outputs, targets):
        return outputs.sum()


def test_a_loss_that_is_an_object_has_the_name_of_its_class() -> None:
    assert name_of(Weighted()) == name_of(Weighted()) == f"{__name__}.Weighted"
    assert name_of(functional.cross_entropy) != name_of(functional.mse_loss)


def test_each_process_judges_its_slice(monkeypatch) -> None:
    net = nn.Linear(3, 2)
    judged = []
    monkeypatch.setattr(shards, "rank", lambda: 0 if distributed._alone else 1)
    monkeypatch.setattr(shards, "world", lambda: 1 if distributed._alone else 2)
    objective = Objective(net, copy.deepcopy(net), CPU)
    handle = net.register_forward_hook(lambda _, args, __: judged.append(len(args[0])))
    objective.judge(Shard(Batches(torch.randn(20, 3), None, 10)))
    handle.remove()
    assert judged == [5, 5]
