"""The verb `profile`: its options move the result, and it is stored whole."""

import dataclasses

import torch

from sft.profiling.profile import load_profile, profile, save_profile


def test_data_free_uses_the_weights_alone(profiled, net, data) -> None:
    aware = profiled
    blind = profile(net, data, "onnxruntime-avx2", rank_multiple=2, data_free=True)
    assert set(aware.statistics) == {"stem", "body", "down"}  # too few samples for fc
    assert blind.statistics == {}
    assert aware.fingerprint != blind.fingerprint
    errors = [[c.error for p in q.layers for c in p.candidates] for q in (aware, blind)]
    assert errors[0] != errors[1]


def test_a_profile_comes_back_as_it_was(profiled, tmp_path) -> None:
    measured = profiled
    save_profile(measured, tmp_path / "p")
    again = load_profile(tmp_path / "p")
    assert again == measured
    for name, statistics in measured.statistics.items():
        stored = again.statistics[name]
        for field in dataclasses.fields(statistics):
            ours, theirs = (getattr(s, field.name) for s in (statistics, stored))
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
