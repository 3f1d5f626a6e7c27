"""Frozen encoders that are no plain Vision Transformers: each layout of features against timm's, indexed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from s5.config import BackboneConfig, LSMCLConfig, ModelConfig
from s5.models import timm_models
from s5.models.backbone import Backbone
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL, check_lsmcl
from tests.s5.toys import MODEL, TASK, batch

SIZE = 64
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
# How timm lays out their features, and settings that make them small.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "swin_tiny_patch4_window7_224": ("NHWC", {"embed_dim": 24}),
    "test_mambaout": ("NHWC", {}),
    "test_resnet": ("NCHW", {}),
    "test_convnext": ("NCHW", {}),
    "test_efficientnet": ("NCHW", {}),
    "test_coatnet": ("NCHW", {}),  # convolutions, then attention
    "vit_tiny_r_s16_p8_224": ("NLC", SMALL),  # convolutions before a Vision Transformer
    "test_vit_relpos": ("NLC", {}),  # positions inside the blocks, no class token
    "beit_base_patch16_224": ("NLC", SMALL | {"patch_size": 16}),
    "eva02_tiny_patch14_224": ("NLC", SMALL | {"patch_size": 16}),
}


def config_of(name: str, **changes: Any) -> BackboneConfig:
    settings: dict[str, Any] = {"name": name, "frame_size": SIZE, "frozen": True}
    return BackboneConfig(**(settings | MODELS[name][1] | changes))


def encoder(name: str, **changes: Any) -> Backbone:
    """Return an encoder whose weights and statistics are all random: many start as 0 or 1."""
    torch.manual_seed(0)
    backbone = Backbone(config_of(name, **changes))
    with torch.no_grad():
        for key, value in backbone.vit.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value) if "running" in key else 0.1 * torch.randn_like(value))
    return backbone


def clips(seed: int = 0, number: int = 2, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, frames, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def slow_tokens(name: str, backbone: Backbone, frame_HWC: Tensor) -> Tensor:
    """Return the tokens (N, D) of one frame: timm's model as timm builds it, its features picked one by one."""
    shape = dict(MODELS[name][1])
    sized = {} if name in ("test_mambaout", "test_resnet", "test_convnext", "test_efficientnet") else {"img_size": SIZE}
    model = timm.create_model(name, **shape, **sized).eval()
    model.load_state_dict(backbone.vit.state_dict(), strict=False)
    colours = rearrange(frame_HWC, "h w c -> 1 c h w").float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = model.forward_features((colours - mean) / std)[0]
    form = MODELS[name][0]
    if form == "NLC":
        return torch.stack([found[i] for i in range(model.num_prefix_tokens, len(found))])
    side = found.shape[1]
    places = [(row, column) for row in range(side) for column in range(side)]
    return torch.stack([found[p] if form == "NHWC" else found[:, p[0], p[1]] for p in places])


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_timms_features_row_by_row(name: str) -> None:
    """In training mode too: a frozen encoder drops nothing at random and keeps its statistics."""
    backbone = encoder(name).train()
    before = {key: value.clone() for key, value in backbone.vit.state_dict().items()}
    frames = clips()
    tokens = backbone(frames)
    assert not tokens.requires_grad
    expected = torch.stack([torch.cat([slow_tokens(name, backbone, frame) for frame in clip]) for clip in frames])
    assert tokens.shape == (2, 3 * backbone.tokens, backbone.width)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(dim=1).max() > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in backbone.vit.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_frame_does_not_depend_on_the_batch(name: str) -> None:
    backbone = encoder(name).train()
    frames = clips()
    alone = torch.cat([backbone(clip[None]) for clip in frames])
    torch.testing.assert_close(backbone(frames), alone, rtol=1e-4, atol=1e-4)


def test_swin_gives_a_grid_of_7_x_7_tokens_of_width_1024() -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(name="swin_base_patch4_window7_224", frozen=True))
    assert (backbone.tokens, backbone.width) == (49, 1024)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_class_token_comes_first(name: str) -> None:
    backbone, with_class = encoder(name), encoder(name, cls_token=True)
    with_class.load(backbone.vit.state_dict())
    tokens, more = backbone(clips()), with_class(clips())
    assert with_class.tokens == backbone.tokens + 1
    assert torch.equal(more.unflatten(1, (3, -1))[:, :, 1:].flatten(1, 2), tokens)
    colours = rearrange(clips(), "b t h w c -> (b t) c h w")
    first = backbone.vit.forward_features((colours - backbone.mean) / backbone.std)[:, 0]
    torch.testing.assert_close(more.unflatten(1, (3, -1))[:, :, 0].flatten(0, 1), first)


@pytest.mark.parametrize("name", MODELS)
def test_own_weights_are_read(name: str, tmp_path: Path) -> None:
    """The file has a head too, as timm's own."""
    state = encoder(name).vit.state_dict() | {"a.head": torch.zeros(1)}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "weights.safetensors")
    loaded = Backbone(config_of(name, weights=str(tmp_path / "weights.safetensors")))
    assert all(torch.equal(value, state[key]) for key, value in loaded.vit.state_dict().items())
    del state[list(loaded.vit.state_dict())[-1]]
    with pytest.raises(ValueError, match=r"backbone.weights are of another model than .*: 1 of \d+ are missing"):
        loaded.load(state)


@pytest.mark.parametrize("name", [*MODELS, "vit_tiny_patch16_224"])
def test_weights_of_any_other_model_are_told(name: str) -> None:
    """Whatever timm's conversion of older layouts looks for in them."""
    settings = MODELS.get(name, ("NLC", SMALL))[1]
    backbone = Backbone(BackboneConfig(name=name, frame_size=SIZE, frozen=True, **settings))  # type: ignore[arg-type]
    odd = [
        {key: torch.zeros(2)}
        for key in (
            "visual.class_embedding",
            "visual.trunk.patch_embed.proj.weight",
            "module.visual.class_embedding",
            "patch_embed.proj.weight",
            "patch_embed.projection.weight",
            "pos_embed",
            "rope.freqs",
            "model.norm.weight",
            "layers.0.blocks.0.attn.relative_position_bias_table",
            "stages.0.blocks.0.attn.relative_position_bias_table",
            "head.fc.weight",
            "downsample_layers.0.0.weight",
            "mask_token",
        )
    ]
    others = [encoder(other).vit.state_dict() for other in ("swin_tiny_patch4_window7_224", "beit_base_patch16_224")]
    for state in (*odd, *others):
        if len(state) == 1 or state.keys() != backbone.vit.state_dict().keys():
            with pytest.raises(ValueError, match=r"backbone.weights are of another model than"):
                backbone.load(state)


# --- what sees whole frames -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_resnet"])
def test_tokens_are_masked_behind_it_and_only_the_decoder_learns(name: str) -> None:
    model = ModelConfig(backbone=config_of(name), decoder=MODEL.decoder)
    torch.manual_seed(0)
    task = LSMCL(model, replace(TASK, mask_on="tokens", mask_ratio=0.25, freeze_patches=True)).train()
    one = replace(batch(0), long=clips(1, 4), short=clips(2, 4))
    loss = task(one)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None for p in task.encoder.backbone.parameters())
    assert all(p.grad is not None for p in task.encoder.decoder.parameters())
    cached = [task.encoder.backbone(x).unflatten(1, (3, -1)) for x in (one.long, one.short)]
    torch.testing.assert_close(task(replace(one, long=cached[0], short=cached[1]))["loss"], loss, rtol=1e-4, atol=1e-4)


def test_its_patches_cannot_be_masked() -> None:
    backbone = config_of("test_convnext")
    message = r"lsmcl.mask_on is 'patches': test_convnext sees whole frames, .*; give tokens"
    with pytest.raises(ValueError, match=message):
        check_lsmcl(ModelConfig(backbone=backbone), LSMCLConfig())
    check_lsmcl(ModelConfig(backbone=backbone), LSMCLConfig(mask_on="tokens"))
    with pytest.raises(ValueError, match=message):
        VideoModel(ModelConfig(backbone=backbone)).encode(clips(), keep_BUK=torch.zeros(2, 3, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "test_resnet",
            {"frozen": False},
            r"backbone.frozen is False: test_resnet \(.* ResNet\) is no plain",
        ),
        ("test_resnet", {"tubelet": 2}, r"backbone.tubelet is 2: test_resnet .* takes single frames; give 1"),
        ("test_resnet", {"cls_token": True}, r"backbone.cls_token is True: test_resnet has no class token; leave it"),
        ("test_resnet", {"depth": 2}, r"backbone.name is 'test_resnet': timm cannot build it with {'depth': 2}"),
        ("test_vit_relpos", {"cls_token": True}, r"backbone.cls_token is True: test_vit_relpos has no class token"),
        (
            "halonet26t",
            {},
            r"backbone.frame_size is 64: halonet26t cannot encode such frames .* size for it, 256",
        ),
        # A list of features, a class token that is counted nowhere, and features of the class token alone.
        (
            "crossvit_9_240",
            {"frame_size": 240},
            r"the features of timm's class CrossVit are no grid of tokens \(list\)",
        ),
        ("coat_lite_tiny", {"frame_size": 224}, r"the features of timm's class CoaT are no grid of tokens \(\(50, "),
        ("pit_ti_224", {"frame_size": 224}, r"timm's class PoolingVisionTransformer are no grid of tokens \(\(1, "),
    ],
)
def test_what_cannot_be_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"name": name, "frame_size": SIZE, "frozen": True}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Backbone(BackboneConfig(**(settings | changes)))


def test_a_form_that_timm_does_not_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features (B, H, W, D) of a model that does not say so."""

    class Silent(nn.Module):
        num_features = 8

        def forward_features(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 4, 4, 8)

    monkeypatch.setattr(timm_models, "_create", lambda config, pretrained=None: Silent())
    with pytest.raises(ValueError, match=r"the features of timm's class Silent are no grid of tokens \(\(4, 4, 8\)\)"):
        timm_models.probe_layout(config_of("test_resnet"))
