"""The example of the published description runs, and its quantised weights survive."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "description_net.py"


def test_four_steps() -> None:
    outcome = runpy.run_path(str(EXAMPLE))["main"]()
    assert outcome["pretrained"] > 0.8
    assert outcome["decomposed"] > outcome["pretrained"] - 0.15
    assert outcome["quantised"] < outcome["finetuned"]
    assert outcome["finetuned"] > 0.8
    assert outcome["dense_parameters"] == 64 * 27 + 64
    assert outcome["small_parameters"] == 16 * 27 + 64 * 16 + 64
    assert outcome["on_grid_after_quantising"] is True
    assert outcome["on_grid_after_one_plain_step"] is False
    assert outcome["on_grid_after_finetuning"] is True
    assert outcome["end_of_training"] == outcome["finetuned"]
