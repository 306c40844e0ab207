"""Building without weights: the same names and shapes, nothing drawn, and torch's compiler stays unloaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mfext.config import GrowthConfig, ModelConfig
from mfext.growth.plan import plan_growth
from mfext.model.build import new_model
from mfext.model.shapes import shapes_alone

CONFIG = ModelConfig(d_model=32, num_layers=2, num_heads=2, d_attention=32, d_feedforward=32, d_router=16)
DENSE = replace(
    CONFIG, architecture="dense", routing_loss_weight=0.0, attention_experts=1, attention_experts_per_token=1,
    feedforward_experts=1, feedforward_experts_per_token=1,
)  # fmt: skip


@pytest.mark.parametrize("config", [plan_growth(CONFIG, GrowthConfig(), "code").after, DENSE])
def test_names_and_shapes_are_the_real_models_and_no_number_is_drawn(config: ModelConfig) -> None:
    state = torch.get_rng_state()
    with shapes_alone():
        shapes = new_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in shapes.values())
    real = new_model(config).state_dict()
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: real[name].shape for name in real}


def test_torchs_compiler_is_not_loaded_for_it() -> None:
    code = (
        "import sys; from mfext.config import GrowthConfig, ModelConfig; from mfext.growth.plan import plan_growth, "
        "count_parameters; count_parameters(plan_growth(ModelConfig(), GrowthConfig(), 'code').after)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
