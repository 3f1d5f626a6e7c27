from __future__ import annotations

import math

import pytest
from torch import nn

from s5.config import OptimConfig, SSMConfig
from s5.models.video_model import VideoModel
from s5.ssm.layers import build_ssm
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.optim import build_optimizer, schedule
from tests.s5.toys import MODEL, TASK


def test_schedule_rises_then_falls_along_a_cosine() -> None:
    assert schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == 1
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0)
    assert schedule(0.0, 0.0) == 1
    assert schedule(0.25, 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_groups_follow_the_hints() -> None:
    module = nn.ModuleDict({"layer": build_ssm(SSMConfig(state=4, lr=1e-4), 8), "norm": nn.LayerNorm(8)})
    optimizer = build_optimizer(module, OptimConfig(lr=1e-3, weight_decay=0.1))
    place = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    named = {name: place[id(parameter)] for name, parameter in module.named_parameters()}
    assert named["norm.weight"] == (1e-3, 0.0)
    assert {named[name] for name in named if name.endswith(("log_dt", "A_imag", "log_A_real"))} == {(1e-4, 0.0)}
    assert {named[name] for name in named if name.endswith("mix.weight")} <= {(1e-3, 0.1)}
    assert (1e-3, 0.1) in place.values()
    assert len(named) == len(list(module.parameters()))


@pytest.mark.parametrize("task", [LSMCL(MODEL, TASK), Supervised(VideoModel(MODEL, 2), "class")])
def test_every_trained_weight_of_a_task_is_in_the_group_of_its_kind(task: nn.Module) -> None:
    config = OptimConfig(lr=2e-3, weight_decay=0.1)
    optimizer = build_optimizer(task, config)
    place = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    named = {name: place.pop(id(p)) for name, p in task.named_parameters() if p.requires_grad}
    assert not place
    for name, (lr, decay) in named.items():
        is_ssm = ".ssm." in name
        # timm's models name their positions and class token.
        undecayed = is_ssm or ".norm" in name or name.endswith((".bias", "pos_embed", "cls_token"))
        undecayed |= task.get_parameter(name).ndim == 1
        assert decay == (0.0 if undecayed else 0.1), name
        assert lr == (SSMConfig().lr if is_ssm and not name.endswith((".C", ".skip")) else 2e-3), name
    assert sum(decay > 0 for _, decay in named.values()) > 5
    assert not any("momentum" in name for name in named)
