"""How far a network's outputs are from the original's, in one number."""

import torch
from torch import nn
from torch.nn import functional


def divergence(reference: torch.Tensor, outputs: torch.Tensor) -> float:
    """Damage per sample: for logits ``(N, classes)`` the mean KL(reference || outputs), in nats;
    for any other output the squared error relative to the reference's variance.
    """
    if reference.ndim == 2 and reference.shape[1] > 1:
        return float(
            functional.kl_div(
                outputs.log_softmax(1),
                reference.log_softmax(1),
                reduction="batchmean",
                log_target=True,
            ).clamp_min(0)
        )
    scale = (reference - reference.mean()).square().mean().clamp_min(1e-30)
    return float((outputs - reference).square().mean() / scale)


@torch.no_grad()
def run(model: nn.Module, inputs: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Outputs of a model on many samples, batch by batch, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(x.to(device)).cpu() for x in torch.split(inputs, batch_size)])
