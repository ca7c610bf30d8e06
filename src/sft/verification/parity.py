"""The verb `verify`: run the exported file in its runtime and compare it with what it should be."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from sft.core.copies import copy_module
from sft.core.data import Data, Evaluate, Loader, Predict, inputs_of, length_of
from sft.core.errors import InputError
from sft.core.files import sha256
from sft.core.progress import track
from sft.core.records import Artifact, Check
from sft.runtimes.runner import Runner, predict_with
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel
from sft.verification.divergence import first_divergence
from sft.verification.placement import integer_fraction
from sft.verification.saturation import saturation_failures

LEAST_SQNR_DB = 15.0
LEAST_AGREEMENT = 0.95
LEAST_AGREEMENT_WITH_ORIGINAL = 0.5


def verify(
    artifact: Artifact,
    model: nn.Module,
    data: Loader | Data,
    evaluate: Evaluate | None = None,
    *,
    simulation: nn.Module | None = None,
    integer_share: float | None = None,
    samples: int | None = None,
    threads: int = 1,
) -> Check:
    """Run the file in its runtime, in a child process, and compare it.

    model : the original; `agreement` is the share of samples on which file and original decide
        alike (argmax; for outputs that are not logits: the share within 10 % relative error).
    data : a loader, or a `Data` whose test split (or what stands in for it) is used.
    evaluate : the user's score of the file; without it the score is the agreement.
    simulation : the quantised network that the file was made from. `max_abs` and `sqnr_db` compare
        the file with it (without it, with `model`), and the check fails below 15 dB, or when they
        agree on fewer than 95 % of the samples: then the runtime computes something else. Without
        it the check fails when file and original agree on less than half of the samples. The
        failure of a `QuantizedModel` names the first layer that differs.
    integer_share : the share of multiply-accumulates that is to run in integers; the check fails
        when fewer did.
    samples : compare at most so many samples (the score always uses all).
    Raises `InputError` if the file is gone or not the one that was exported.
    """
    if isinstance(data, Data):
        data = data.split("test")[0]
    model = copy_module(model)
    if sha256_changed(artifact):
        raise InputError(f"'{artifact.path}' is not the file that was exported: export it again.")
    with Runner(artifact.path, find_target(artifact.target).runtime, threads) as runner:
        predict = predict_with(runner)
        compared = _compare(predict, model, simulation, data, samples)
        fraction = integer_fraction(runner.place())
        score = compared.agreement if evaluate is None else evaluate(predict, data)
    wanted = (0.01 if artifact.integers else 0.0) if integer_share is None else integer_share
    failures = _failures(compared, simulation is not None, wanted, fraction)
    if _differs(compared) and isinstance(simulation, QuantizedModel):
        failures.append(_name_layer(artifact, simulation, data))
    failures += saturation_failures(artifact)
    if score is not None and not math.isfinite(score):
        raise InputError(
            f"evaluate returned {score} for '{artifact.path}'; a finite score is wanted."
        )
    return Check(
        passed=not failures,
        max_abs=compared.max_abs,
        sqnr_db=compared.sqnr_db,
        agreement=compared.agreement,
        integer_macs_fraction=fraction,
        score=score,
        samples=compared.samples,
        failures=tuple(failures),
    )


def agreement_with(model: nn.Module) -> Evaluate:
    """An `evaluate` for unlabelled data: the share of samples decided as `model` decides them."""

    original = _predictor(copy_module(model))

    def evaluate(predict: Predict, loader: Loader) -> float:
        alike = count = 0
        with torch.no_grad():
            for batch in loader:
                x = inputs_of(batch)
                alike += _alike(predict(x), original(x))
                count += len(x)
        return alike / max(count, 1)

    return evaluate


def sha256_changed(artifact: Artifact) -> bool:
    from pathlib import Path

    return sha256(Path(artifact.path)) != artifact.sha256


@dataclasses.dataclass(frozen=True)
class _Comparison:
    max_abs: float
    sqnr_db: float
    agreement: float
    alike_simulation: float
    finite: bool
    samples: int


@torch.no_grad()
def _compare(
    predict: Predict,
    model: nn.Module,
    simulation: nn.Module | None,
    loader: Loader,
    samples: int | None,
) -> _Comparison:
    reference = simulation if simulation is not None else model
    original, simulated = _predictor(model), _predictor(reference)
    worst = signal = noise = 0.0
    alike = alike_simulation = count = 0
    finite = True
    for batch in track(loader, "batches compared", length_of(loader)):
        x = inputs_of(batch)
        x = x if samples is None else x[: samples - count]
        outputs, wanted = predict(x), simulated(x)
        finite = finite and bool(torch.isfinite(outputs).all())
        difference = (outputs - wanted).double()
        worst = max(worst, float(difference.abs().max()))
        signal += float(wanted.double().square().sum())
        noise += float(difference.square().sum())
        alike_simulation += _alike(outputs, wanted)
        alike += _alike(outputs, original(x)) if simulation is not None else 0
        count += len(x)
        if samples is not None and count >= samples:
            break
    if count == 0:
        raise InputError("There is nothing to compare: the data is empty.")
    alike = alike if simulation is not None else alike_simulation
    sqnr = 10 * float(torch.tensor(max(signal, 1e-30) / max(noise, 1e-30)).log10())
    return _Comparison(worst, sqnr, alike / count, alike_simulation / count, finite, count)


def _failures(
    compared: _Comparison, simulated: bool, integer_share: float, fraction: float
) -> list[str]:
    failures: list[str] = []
    if not compared.finite:
        failures.append("The file gives NaN or infinite outputs.")
    if simulated and compared.sqnr_db < LEAST_SQNR_DB:
        failures.append(
            f"The file is {compared.sqnr_db:.1f} dB from its simulation, {LEAST_SQNR_DB:.0f} dB is "
            "wanted: the runtime computes something else (saturating integer sums, for one)."
        )
    if simulated and compared.alike_simulation < LEAST_AGREEMENT:
        failures.append(
            f"File and simulation agree on {compared.alike_simulation:.1%} of the samples, "
            f"{LEAST_AGREEMENT:.0%} is wanted."
        )
    if not simulated and compared.agreement < LEAST_AGREEMENT_WITH_ORIGINAL:
        failures.append(
            f"File and original agree on {compared.agreement:.1%} of the samples, "
            f"{LEAST_AGREEMENT_WITH_ORIGINAL:.0%} is wanted: it may be the file of another network."
        )
    if fraction < integer_share - 0.005:
        failures.append(
            f"{fraction:.1%} of the multiply-accumulates ran in integers, where the plan asks for "
            f"{integer_share:.1%}: the runtime did not fuse some layers."
        )
    return failures


def _differs(compared: _Comparison) -> bool:
    """Whether file and reference differ too much for rounding."""
    return compared.sqnr_db < LEAST_SQNR_DB or compared.alike_simulation < LEAST_AGREEMENT


def _name_layer(artifact: Artifact, simulation: QuantizedModel, loader: Loader) -> str:
    """Which layer of the file computes something else, in words."""
    try:
        found = first_divergence(artifact, simulation, inputs_of(next(iter(loader))))
    except InputError as error:
        return f"Which layer it is cannot be told: {error}"
    return str(found or "Each layer by itself gives what it should, to a step.")


def _predictor(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def predict(x: torch.Tensor) -> torch.Tensor:
        outputs = model(x.to(device))
        first = outputs[0] if isinstance(outputs, tuple | list) else outputs
        assert isinstance(first, torch.Tensor)
        return first.cpu()

    return predict


def _alike(outputs: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many samples of a batch are decided alike."""
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        return int((outputs.argmax(1) == wanted.argmax(1)).sum())
    error = (outputs - wanted).flatten(1).norm(dim=1)
    return int((error <= 0.1 * wanted.flatten(1).norm(dim=1)).sum())
