"""Backbone, model and checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from einops import rearrange
from safetensors.torch import save_file

from s5 import checkpoint
from s5.augment import colour_jitter
from s5.backbone import Backbone, random_masking, read_weights
from s5.checkpoint import CheckpointError, load_model
from s5.config import BackboneConfig, ModelConfig, from_json
from s5.finetune import Supervised
from s5.loop import SoloContext
from s5.lsmcl import LSMCL
from s5.model import VideoModel, check_model
from tests.s5.toys import MODEL, STEPS, TASK, batch, finetune_fit, lsmcl_fit, saved

# Class token; average pooling with registers; attention pooling; class token with registers.
VITS = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_reg4_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch14_reg4_dinov2",
]


def leaves(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


# --- backbone -------------------------------------------------------------------------------------------------------


def test_all_patches_kept_equals_timm() -> None:
    backbone = Backbone(MODEL.backbone).eval()
    frames = batch(0).long
    images = rearrange(frames, "b t h w c -> (b t) c h w").float() / 255
    mean, std = (torch.tensor(backbone.vit.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    expected = backbone.vit.forward_features((images - mean) / std)[:, 1:]
    tokens = backbone(frames)
    torch.testing.assert_close(tokens, rearrange(expected, "(b t) n d -> b (t n) d", b=len(frames)))
    everything = torch.arange(backbone.patches).expand(*frames.shape[:2], -1)
    torch.testing.assert_close(backbone(frames, everything), tokens)


def test_dropped_patches_are_not_seen() -> None:
    backbone = Backbone(MODEL.backbone).eval()
    frames = batch(0).long
    keep = random_masking(torch.arange(4), "mask", 3, backbone.patches, 5)
    assert keep is not None
    other = frames.clone()
    grid = rearrange(other, "b t (r p) (c q) k -> b t (r c) p q k", p=8, q=8)
    hidden = torch.ones(4, 3, backbone.patches, dtype=torch.bool).scatter_(2, keep, False)
    grid[hidden] = 0
    other = rearrange(grid, "b t (r c) p q k -> b t (r p) (c q) k", r=4)
    assert not torch.equal(other, frames)
    assert backbone(frames, keep).shape == (4, 3 * 5, 16)
    assert torch.equal(backbone(frames, keep), backbone(other, keep))


def test_random_masking_draws_without_replacement_by_seed_alone() -> None:
    seeds = torch.arange(6)
    keep = random_masking(seeds, "mask", 3, 16, 8)
    assert keep is not None
    assert torch.equal(keep, keep.sort(-1).values)
    assert all(len(set(row)) == 8 for row in keep.flatten(0, 1).tolist())
    halves = [random_masking(part, "mask", 3, 16, 8) for part in seeds.split(3)]
    assert torch.equal(torch.cat([half for half in halves if half is not None]), keep)
    assert random_masking(seeds, "mask", 3, 16, 16) is None


def test_class_token_and_frozen_backbone() -> None:
    backbone = Backbone(replace(MODEL.backbone, cls_token=True, frozen=True))
    tokens = backbone(batch(0).long)
    assert tokens.shape == (4, 3 * 17, 16)
    assert not tokens.requires_grad


@pytest.mark.parametrize("name", VITS)
def test_every_trained_weight_of_any_vit_gets_a_gradient(name: str) -> None:
    """DDP waits for each; and no prefix token, such as a register, is handed on."""
    backbone = Backbone(replace(MODEL.backbone, name=name))
    tokens = backbone(batch(0, frames=1).long)
    assert tokens.shape == (4, 16, 16)
    tokens.square().sum().backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


def test_class_token_is_handed_on_without_the_registers() -> None:
    config = replace(MODEL.backbone, name="vit_base_patch14_reg4_dinov2", cls_token=True)
    backbone = Backbone(config).eval()
    frames = batch(0, frames=1).long
    images = rearrange(frames, "b 1 h w c -> b c h w").float()
    expected = backbone.vit.forward_features((images - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(frames), torch.cat([expected[:, :1], expected[:, 5:]], dim=1))


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_own_weights_are_read_and_resized(tmp_path: Path, name: str, ending: str) -> None:
    """The file has what comes after the blocks too, as timm's own."""
    shape = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
    source = timm.create_model(name, img_size=32, num_classes=5, **shape)
    path = str(tmp_path / f"vit.{ending}")
    if ending == "pt":
        torch.save({"model": source.state_dict(), "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    config = replace(MODEL.backbone, name=name)
    loaded = Backbone(replace(config, weights=path))
    for key, value in loaded.vit.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    larger = VideoModel(replace(MODEL, backbone=replace(config, frame_size=64)))
    larger.load_backbone(read_weights(path))
    assert larger.backbone.patches == 64
    assert torch.equal(larger.backbone.vit.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_both_branches_of_lsmcl_start_from_the_weights_shipped() -> None:
    state = Backbone(MODEL.backbone).vit.state_dict()
    task = LSMCL(MODEL, TASK)
    task.load_backbone(state)
    for branch in (task.encoder, task.momentum_encoder):
        assert all(torch.equal(value, state[key]) for key, value in branch.backbone.vit.state_dict().items())


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    backbone = Backbone(MODEL.backbone)
    state = backbone.vit.state_dict()
    del state["norm.bias"]
    with pytest.raises(
        ValueError, match=r"backbone.weights are of another model than vit_tiny.*: 1 of \d+ .* 'norm.bi"
    ):
        backbone.load(state)
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(ValueError, match=r"backbone.weights is '.*broken.*': it cannot be read \(.+\); give a"):
            read_weights(str(tmp_path / name))
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="there are no weights in it"):
        read_weights(str(tmp_path / "empty.pt"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(name="vit_tinny"), "backbone.name is 'vit_tinny': timm has no such model"),
        (BackboneConfig(name="resnet18"), "backbone.name is 'resnet18': .*Vision Transformer|cannot build"),
        (replace(MODEL.backbone, frame_size=36), "backbone.frame_size is 36: give a multiple of the patch size, 8"),
        (
            replace(MODEL.backbone, name="vit_base_patch16_siglip_224", cls_token=True),
            "backbone.cls_token is True: vit_base_patch16_siglip_224 has no class token; leave it out",
        ),
        (replace(MODEL.backbone, weights="none.pt"), "backbone.weights is 'none.pt': there is no such file"),
    ],
)
def test_backbone_mistakes_are_named(config: BackboneConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(config)


def test_frames_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"frames are \(1, 2, 16, 16, 3\): the model .* wants \(B, T, 32, 32, 3\)"):
        Backbone(MODEL.backbone)(torch.zeros(1, 2, 16, 16, 3))


def test_colour_jitter_is_one_draw_a_clip_by_seed() -> None:
    frames, seeds = batch(0).long, torch.arange(4)
    jittered = colour_jitter(frames, seeds, "long/jitter", 0.4)
    halves = [colour_jitter(f, s, "long/jitter", 0.4) for f, s in zip(frames.split(2), seeds.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), jittered)
    assert not torch.equal(jittered, colour_jitter(frames, seeds, "short/jitter", 0.4))
    assert colour_jitter(frames, seeds, "long/jitter", 0) is frames
    still = frames[:, :1].expand(-1, 3, -1, -1, -1)
    moved = colour_jitter(still, seeds, "long/jitter", 0.4)
    torch.testing.assert_close(moved[:, 0], moved[:, 2])


# --- model ----------------------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic_and_keeps_half() -> None:
    torch.manual_seed(0)
    model = VideoModel(MODEL, 2).eval()
    first, second = model(batch(0).long), model(batch(0).long)
    assert torch.equal(first.logits_BC, second.logits_BC)
    assert first.logits_BC.shape == (4, 2)
    assert first.kept[0].shape == (4, 24)
    assert first.entropy is not None
    assert 0 <= float(first.entropy) <= 1


@pytest.mark.parametrize(("ratios", "share"), [((), 1), ((0.5,), 0.5), ((1.0, 0.5), 0.5), ((0.5, 0.25), 0.125)])
def test_the_share_of_tokens_kept_is_logged(ratios: tuple[float, ...], share: float) -> None:
    """A token that a pair was averaged into stands for both."""
    decoder = replace(MODEL.decoder, selection=replace(MODEL.decoder.selection, keep_ratio=ratios))
    task = Supervised(VideoModel(replace(MODEL, decoder=decoder), 2), "class")
    kept = task(batch(0))["keep_ratio"]
    assert kept.shape == ()
    assert float(kept) == pytest.approx(share)


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
    fit = finetune_fit(SoloContext(tmp_path))
    fit.run()
    model, meta = load_model(saved(tmp_path)[-1])
    assert (meta.kind, meta.step, meta.classes) == ("class", STEPS, ["a", "b"])
    fit.task.eval()
    frames = batch(0).long
    assert torch.equal(model(frames).logits_BC, fit.task.model(frames).logits_BC)  # type: ignore[union-attr,operator]


def test_fine_tuning_starts_from_the_pretrained_encoder(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path)).run()
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


def test_another_architecture_is_named(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path)).run()
    folder = saved(tmp_path)[-1]
    checkpoint.check_architecture(folder, leaves(asdict(MODEL)))
    with pytest.raises(CheckpointError, match=r"model.backbone.depth is 1 there and 2 here; give --model.backbone.dep"):
        checkpoint.check_architecture(folder, leaves(asdict(MODEL)) | {"backbone.depth": 2})
    deeper = VideoModel(replace(MODEL, backbone=replace(MODEL.backbone, depth=2)), 2)
    with pytest.raises(ValueError, match="another architecture"):
        deeper.load_pretrained(checkpoint.encoder_weights(folder))


def test_damage_is_told(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path)).run()
    folder = saved(tmp_path)[-1]
    assert checkpoint.is_complete(folder)
    (folder / "optimizer.safetensors").unlink()
    assert not checkpoint.is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"is damaged: model.safetensors"):
        load_model(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged meta.json"):
        checkpoint.read_meta(folder)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.read_meta(tmp_path)


def test_configs_survive_json() -> None:
    assert from_json(ModelConfig, json.loads(json.dumps(asdict(MODEL)))) == MODEL
    with pytest.raises(ValueError, match="ModelConfig has no such setting"):
        from_json(ModelConfig, {"backbne": {}})
