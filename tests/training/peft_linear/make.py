"""Writes numbers.json: what peft makes of one nn.Linear with given factors.

    pip install peft && python tests/training/peft_linear/make.py

The numbers are kept instead of the package: peft brings transformers, accelerate and nine more packages, which other
libraries here then import when they find them, for the sake of one matrix product.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from torch import nn

RANK, ALPHA = 3, 6.0


def main() -> None:
    torch.manual_seed(5)
    linear, x = nn.Linear(5, 7), torch.randn(4, 5)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(linear), settings)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not b.any() and a.abs().max() <= 5**-0.5
    with torch.no_grad():
        b.normal_()
    y = model(x)
    y.square().sum().backward()
    numbers = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "right": a,
        "left": b,
        "y": y,
        "right_gradient": a.grad,
        "left_gradient": b.grad,
        "merged": model.merge_and_unload()[0].weight,
    }
    plain = {name: value.detach().tolist() for name, value in numbers.items()}
    about = {"peft": peft.__version__, "torch": torch.__version__, "rank": RANK, "alpha": ALPHA}
    path = Path(__file__).with_name("numbers.json")
    path.write_text(json.dumps({**about, **plain}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
