"""A made-up result in the shape of `result.json`."""

from typing import Any

import pytest

HOSTILE = "head<script>alert('x')</script>"


@pytest.fixture
def result() -> dict[str, Any]:
    before = {
        "file_bytes": 2_790_000,
        "packed_bytes": 2_785_000,
        "params": 696_042,
        "macs": 80_500_000,
        "score": 0.942,
        "latency_ms": 1.63,
        "latency_ms_min": 1.6,
        "latency_ms_p90": 1.7,
        "peak_memory_bytes": 60_000_000,
    }
    after = {
        "file_bytes": 310_000,
        "packed_bytes": 248_000,
        "params": 201_400,
        "macs": 21_300_000,
        "score": 0.9391,
        "latency_ms": 0.47,
        "latency_ms_min": 0.46,
        "latency_ms_p90": 0.52,
        "peak_memory_bytes": 50_000_000,
        "weight_bits_mean": 7.5,
        "compute_bits": 8,
    }
    return {
        "schema": 1,
        "model": "fashion-resnet",
        "target": "onnxruntime-avx2",
        "seed": 3,
        "threads": 1,
        "versions": {"torch": "2.13.0", "onnxruntime": "1.99.1"},
        "machine": "AMD EPYC",
        "metric": "top1",
        "split": "test",
        "before": before,
        "after": after,
        "budget": {"asked": {"size": 0.1, "macs": 0.3, "max_drop": 0.005}, "met": True},
        "check": {
            "passed": True,
            "max_abs": 0.13,
            "sqnr_db": 35.0,
            "agreement": 0.97,
            "integer_macs_fraction": 0.9876,
        },
        "layers": [
            {
                "name": "stages.0.0.conv1",
                "scheme": "channel_in",
                "rank": [8],
                "weight_bits": 8,
                "predicted_damage": 0.0123,
                "reason": "cheapest within the budget",
                "params": 1000,
                "macs": 2_000_000,
                "size": 3000,
                "params_before": 4000,
                "macs_before": 8_000_000,
                "size_before": 16_000,
            },
            {
                "name": HOSTILE,
                "scheme": "keep",
                "rank": [],
                "weight_bits": None,
                "predicted_damage": float("nan"),
                "reason": "kept & left alone",
            },
        ],
        "seconds": {"profile": 12.0, "finetune": 150.0},
        "unknown_key": {"ignored": True},
    }
