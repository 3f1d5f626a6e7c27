"""Model and checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from s5.checkpoints import checkpoint
from s5.checkpoints.checkpoint import read_model
from s5.config import ModelConfig, from_json
from s5.errors import CheckpointError
from s5.models.video_model import VideoModel, check_model
from s5.tasks.supervised import Supervised
from s5.training.context import SoloContext
from tests.s5.toys import MODEL, STEPS, batch, finetune_loop, lsmcl_loop, saved


def leaves(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


# --- model ----------------------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic_and_keeps_half() -> None:
    torch.manual_seed(0)
    model = VideoModel(MODEL, 2).eval()
    first, second = model(batch(0).long), model(batch(0).long)
    assert torch.equal(first.logits_BC, second.logits_BC)
    assert first.logits_BC.shape == (4, 2)
    assert first.kept[0].shape == (4, 24)
    assert 0 <= float(first.selection["entropy"]) <= 1


@pytest.mark.parametrize(("ratios", "share"), [((), 1), ((0.5,), 0.5), ((1.0, 0.5), 0.5), ((0.5, 0.25), 0.125)])
def test_the_share_of_tokens_kept_is_logged(ratios: tuple[float, ...], share: float) -> None:
    """A token that a pair was averaged into stands for both."""
    decoder = replace(MODEL.decoder, selection=replace(MODEL.decoder.selection, keep_ratio=ratios))
    task = Supervised(VideoModel(replace(MODEL, decoder=decoder), 2), "class")
    kept = task(batch(0))["keep_ratio"]
    assert kept.shape == ()
    assert float(kept) == pytest.approx(share)


def test_tubelets_train_with_a_head() -> None:
    model = VideoModel(replace(MODEL, backbone=replace(MODEL.backbone, tubelet=2)), 2)
    task = Supervised(model, "class")
    task(batch(0, frames=4))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.eval()(batch(0, frames=4).long).kept[0].shape == (4, 16)


def test_bf16_autocast_is_close_to_fp32() -> None:
    torch.manual_seed(0)
    model = VideoModel(MODEL, 2).eval()
    full = model(batch(0).long).logits_BC
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch(0).long).logits_BC
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.05)


def test_settings_that_do_not_fit_together_are_found_without_memory() -> None:
    check_model(ModelConfig())
    odd = replace(MODEL, backbone=replace(MODEL.backbone, embed_dim=18))
    with pytest.raises(ValueError, match=r"decoder.width"):
        check_model(odd)


def test_a_model_without_head_says_so() -> None:
    with pytest.raises(ValueError, match="the model has no head"):
        VideoModel(MODEL)(batch(0).long)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_rebuild_their_model_alone(tmp_path: Path) -> None:
    loop = finetune_loop(SoloContext(tmp_path))
    loop.run()
    model, meta = read_model(saved(tmp_path)[-1])
    assert (meta.kind, meta.step, meta.classes) == ("class", STEPS, ["a", "b"])
    loop.task.eval()
    frames = batch(0).long
    assert torch.equal(model(frames).logits_BC, loop.task.model(frames).logits_BC)  # type: ignore[union-attr,operator]


def test_fine_tuning_starts_from_the_pretrained_encoder(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path)).run()
    folder = saved(tmp_path)[-1]
    weights = checkpoint.encoder_weights(folder)
    model = VideoModel(MODEL, 2)
    model.load_pretrained(weights)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    fresh = {name for name in own if name not in weights}
    assert fresh
    assert all("selection." in name or "head." in name for name in fresh)
    momentum = next(name for name in own if "selection.momentum" in name and name.endswith("log_dt"))
    assert torch.equal(own[momentum], own["decoder.blocks.0.layer.ssm.log_dt"])


def test_tokens_stand_in_for_frames() -> None:
    model = VideoModel(MODEL, 2).eval()
    frames, seeds = batch(0).long, batch(0).seeds
    tokens_BUND = model.backbone(frames).unflatten(1, (frames.shape[1], -1))
    assert torch.equal(model(tokens_BUND, seeds).logits_BC, model(frames, seeds).logits_BC)
    assert model(tokens_BUND.half(), seeds).logits_BC.dtype == torch.float32
    with pytest.raises(ValueError, match=r"tokens are .*: the backbone gives"):
        model(tokens_BUND[:, :, 1:], seeds)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path)).run()
    folder = saved(tmp_path)[-1]
    checkpoint.check_architecture(folder, leaves(asdict(MODEL)))
    with pytest.raises(CheckpointError, match=r"model.backbone.depth is 1 there and 2 here; give --model.backbone.dep"):
        checkpoint.check_architecture(folder, leaves(asdict(MODEL)) | {"backbone.depth": 2})
    checkpoint.check_architecture(folder, leaves(asdict(MODEL)) | {"decoder.name": "vtm"})
    with pytest.raises(CheckpointError, match=r"model.decoder.name is 's5' there and 'lst' here; give --model"):
        checkpoint.check_architecture(folder, leaves(asdict(MODEL)) | {"decoder.name": "lst"})
    with pytest.raises(CheckpointError, match=r"has a frame encoder of its own, '.*', and the features are imported"):
        checkpoint.check_architecture(folder, leaves(asdict(MODEL)) | {"backbone.tokens": 3, "backbone.width": 8})
    deeper = VideoModel(replace(MODEL, backbone=replace(MODEL.backbone, depth=2)), 2)
    with pytest.raises(ValueError, match="another architecture"):
        deeper.load_pretrained(checkpoint.encoder_weights(folder))


def test_damage_is_told(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path)).run()
    folder = saved(tmp_path)[-1]
    assert checkpoint.verify(folder).step == STEPS
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer.safetensors is missing"):
        checkpoint.verify(folder)
    (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"is damaged: model.safetensors"):
        read_model(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: meta.json"):
        checkpoint.read_meta(folder)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.read_meta(tmp_path)


def test_configs_survive_json() -> None:
    assert from_json(ModelConfig, json.loads(json.dumps(asdict(MODEL)))) == MODEL
    with pytest.raises(ValueError, match="ModelConfig has no such setting"):
        from_json(ModelConfig, {"backbne": {}})
