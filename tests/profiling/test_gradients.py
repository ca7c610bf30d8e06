"""The second moment of gradients against one sample at a time, and against the Fisher matrix."""

import pytest
import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.profiling.statistics import gather_statistics


def one_by_one(model: nn.Module, layer: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """``(G, o, o)`` mean over samples and positions of g g^T, by one backward pass a sample."""
    groups = getattr(layer, "groups", 1)
    total, count = torch.zeros(()), 0
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, y: Tensor) -> Tensor:
        kept.append(y)
        return y.clone()  # what follows may change it in place

    hook = layer.register_forward_hook(keep)
    for sample, direction in zip(x, directions, strict=True):
        kept.clear()
        output = model(sample[None])
        for g in torch.autograd.grad((output[0] * direction).sum(), kept):
            rows = (g if isinstance(layer, nn.Linear) else g.movedim(1, -1)).flatten(0, -2)
            split = rows.unflatten(1, (groups, -1)).transpose(0, 1)
            total = total + split.mT @ split
            count += len(rows)
    hook.remove()
    return total / count


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(54, 4),
    ).double()


def test_classes_are_drawn_from_the_models_answers() -> None:
    torch.manual_seed(0)
    model, x = classifier(), torch.randn(9, 2, 8, 8, dtype=torch.float64) * 3
    names = ["0", "2", "5"]
    found, _ = gather_statistics(model, names, [x[:5], x[5:]], gradients=True, seed=7)
    generator = torch.Generator().manual_seed(7)
    chances = model(x).softmax(1).detach()
    classes = [torch.multinomial(c, 1, generator=generator) for c in chances.split([5, 4])]
    # the gradient of cross entropy at the logits is the softmax minus the class
    directions = chances - nn.functional.one_hot(torch.cat(classes)[:, 0], 4)
    for name in names:
        wanted = one_by_one(model, model[int(name)], x, directions)
        torch.testing.assert_close(found[name].gradient_covariance, wanted)


def test_at_the_logits_it_is_the_fisher_matrix() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4)).double(), torch.randn(20000, 3).double()
    found, _ = gather_statistics(model, ["0"], list(x.split(4000)), gradients=True)
    chances = model(x).softmax(1).detach()
    fisher = torch.diag(chances.mean(0)) - chances.T @ chances / len(x)
    assert float((found["0"].gradient_covariance[0] - fisher).norm() / fisher.norm()) < 0.03


class Answers(nn.Module):
    """A network that answers with more than one tensor, none of them logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.mix = nn.Linear(4, 6)
        self.head = nn.Conv1d(6, 3, 3)

    def forward(self, tokens: Tensor) -> dict[str, object]:
        y = self.mix(self.embed(tokens)).relu_()
        return {"map": self.head(y.mT), "other": (y, None), "tokens": tokens}


def test_random_directions_of_other_outputs() -> None:
    torch.manual_seed(0)
    model, tokens = Answers().double(), torch.randint(10, (3000, 5))
    found, _ = gather_statistics(model, ["head", "mix"], list(tokens.split(500)), gradients=True)
    # unit normal directions: at the head itself the second moment is the identity
    moment = found["head"].gradient_covariance[0]
    assert float((moment - torch.eye(3)).abs().max()) < 0.05
    # before the ReLU: J J^T of (map, y) with respect to the linear layer's output, averaged
    y = model.mix(model.embed(tokens)).detach()
    weight = model.head.weight.detach()
    gram = torch.einsum("oik,ojk->kij", weight, weight)
    taps = [slice(0, 1), slice(0, 2), slice(0, 3), slice(1, 3), slice(2, 3)]  # of each position
    per_position = [gram[own].sum(0) for own in taps]
    on = (y > 0).double()
    wanted = torch.stack(
        [
            torch.einsum("ni,nj->ij", on[:, p], on[:, p]) * (per_position[p] + torch.eye(6))
            for p in range(5)
        ]
    ).sum(0) / (5 * len(tokens))
    moment = found["mix"].gradient_covariance[0]
    assert float((moment - wanted).norm() / wanted.norm()) < 0.05


def test_a_layer_that_no_gradient_reaches_counts_as_zero() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    found, _ = gather_statistics(Side(), ["used", "unused"], [torch.randn(5, 3)], gradients=True)
    assert float(found["unused"].gradient_covariance.abs().max()) == 0
    assert float(found["used"].gradient_covariance.abs().max()) > 0


def test_outputs_without_gradient_are_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(1)

    model = Chosen()
    with pytest.raises(InputError, match="can be differentiated"):
        gather_statistics(model, ["layer"], [torch.randn(5, 3)], gradients=True)
    assert model.layer.weight.requires_grad
