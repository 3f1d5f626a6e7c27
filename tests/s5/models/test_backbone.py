"""Frame encoder: timm's tokens, masking, tubelets, weights, and what it says of mistakes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from s5.config import BackboneConfig, ClipConfig
from s5.models.backbone import Backbone, random_masking, read_weights
from s5.models.video_model import VideoModel
from tests.s5.toys import MODEL, batch

TINY = MODEL.backbone
# What timm's class VisionTransformer comes as, by a model of each kind.
FAMILIES = [
    "vit_tiny_patch16_224",  # class token
    "vit_base_patch16_gap_224",  # average pooling, no class token
    "vit_base_patch16_reg4_gap_256",  # registers, no class token, no position for either
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_so150m_patch16_reg4_map_256",  # attention pooling and registers that have positions
    "vit_base_patch14_dinov2",  # layer scale
    "vit_base_patch14_reg4_dinov2",  # class token and registers, no position for either
    "deit_tiny_distilled_patch16_224",  # class and distillation token
    "deit3_small_patch16_224",  # class token without position
    "vit_base_patch16_clip_224",  # norm before the blocks, no bias in the projection
    "vit_base_patch16_xp_224",  # attention and MLP in parallel, RMSNorm
    "vit_base_patch16_rpn_224",  # norms after the residual branches
    "vit_small_patch16_18x2_224",  # two of each layer in parallel
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_base_patch16_radio_v3",  # no norm at the end
    "vit_intern300m_patch14_448",  # any image size at run time
    "aimv2_large_patch14_224",  # norm after the projection
    "beit3_base_patch16_224",  # norms inside attention and MLP
]


def moved(backbone: Backbone) -> Backbone:
    """Return a backbone whose weights are all random: norms start as 1, some tokens as 0."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def timm_features(backbone: Backbone, frames_BTHWC: Tensor) -> Tensor:
    """Return what timm's model makes of each frame, in evaluation mode: (B * T, prefix tokens and patches, D)."""
    images = rearrange(frames_BTHWC, "b t h w c -> (b t) c h w").float() / 255
    mean, std = (torch.tensor(backbone.vit.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    features: Tensor = backbone.vit.eval().forward_features((images - mean) / std)
    return features


def without_blocks(backbone: Backbone) -> Backbone:
    """Return a backbone whose tokens do not see each other."""
    backbone.vit.blocks = nn.Sequential()
    return backbone


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_timm(name: str) -> None:
    """In training mode: nothing is dropped at random."""
    backbone = moved(Backbone(replace(TINY, name=name)))
    frames = batch(0).long
    expected = timm_features(backbone, frames)[:, backbone.vit.num_prefix_tokens :]
    tokens = backbone.train()(frames)
    torch.testing.assert_close(tokens, rearrange(expected, "(b t) n d -> b (t n) d", b=len(frames)))
    everything = torch.arange(backbone.patches).expand(*frames.shape[:2], -1)
    torch.testing.assert_close(backbone(frames, everything), tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_token_comes_first_and_no_other_prefix_is_handed_on(name: str) -> None:
    config = replace(TINY, name=name, cls_token=True)
    if not Backbone(replace(TINY, name=name)).vit.has_class_token:
        with pytest.raises(ValueError, match=f"backbone.cls_token is True: {name} has no class token; leave it out"):
            Backbone(config)
        return
    backbone = moved(Backbone(config))
    frames = batch(0, frames=1).long
    expected = timm_features(backbone, frames)
    expected = torch.cat([expected[:, :1], expected[:, backbone.vit.num_prefix_tokens :]], dim=1)
    torch.testing.assert_close(backbone(frames), expected)


@pytest.mark.parametrize("tubelet", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_weight_gets_a_gradient(name: str, tubelet: int) -> None:
    """DDP waits for each."""
    backbone = Backbone(replace(TINY, name=name, tubelet=tubelet))
    tokens = backbone(batch(0).long)
    assert tokens.shape == (4, 16 * 3 // tubelet, 16)
    tokens.square().sum().backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


def test_a_frozen_backbone_gets_no_gradient() -> None:
    assert not Backbone(replace(TINY, frozen=True))(batch(0).long).requires_grad


@pytest.mark.parametrize(("tubelet", "cls_token"), [(1, False), (2, False), (2, True)])
def test_a_token_is_where_its_index_says(tubelet: int, cls_token: bool) -> None:
    """Another pixel in frame 3, second row and third column of patches, is another token of that step and patch."""
    backbone = without_blocks(Backbone(replace(TINY, tubelet=tubelet, cls_token=cls_token)))
    frames = batch(0, frames=4).long
    other = frames.clone()
    other[:, 3, 8:16, 16:24] = 0
    changed = (backbone(frames) != backbone(other)).any(-1)
    step_tokens = 16 + cls_token
    assert changed.shape[1] == 4 // tubelet * step_tokens
    assert changed.nonzero()[:, 1].unique().tolist() == [3 // tubelet * step_tokens + cls_token + 6]


# --- masking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_patches_are_not_seen(name: str, tubelet: int) -> None:
    backbone = moved(Backbone(replace(TINY, name=name, tubelet=tubelet)))
    frames = batch(0, frames=4).long
    steps = 4 // tubelet
    keep = random_masking(torch.arange(4), "mask", steps, backbone.patches, 5)
    assert keep is not None
    other = frames.clone()
    grid = rearrange(other, "b (u t) (r p) (c q) k -> b u (r c) t p q k", u=steps, p=8, q=8)
    grid[torch.ones(4, steps, 16, dtype=torch.bool).scatter_(2, keep, False)] = 0
    other = rearrange(grid, "b u (r c) t p q k -> b (u t) (r p) (c q) k", r=4)
    assert not torch.equal(other, frames)
    assert backbone(frames, keep).shape == (4, steps * 5, 16)
    assert torch.equal(backbone(frames, keep), backbone(other, keep))
    assert not torch.equal(backbone(frames), backbone(other))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_patches_that_stay_keep_their_positions(name: str) -> None:
    backbone = without_blocks(moved(Backbone(replace(TINY, name=name))))
    frames = batch(0).long
    keep = random_masking(torch.arange(4), "mask", 3, backbone.patches, 5)
    assert keep is not None
    tokens = rearrange(backbone(frames), "b (t n) d -> b t n d", t=3)
    expected = tokens.gather(2, keep[..., None].expand(-1, -1, -1, 16))
    torch.testing.assert_close(backbone(frames, keep), expected.flatten(1, 2))


@pytest.mark.parametrize("tubelet", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_patches_have_the_gradient_of_picking_among_all(name: str, tubelet: int) -> None:
    backbone = without_blocks(moved(Backbone(replace(TINY, name=name, tubelet=tubelet)))).double()
    steps = 3 // tubelet
    keep = random_masking(torch.arange(4), "mask", steps, backbone.patches, 5)
    assert keep is not None
    every = rearrange(backbone(batch(0).long), "b (u n) d -> b u n d", u=steps)
    picked = every.gather(2, keep[..., None].expand(-1, -1, -1, 16)).flatten(1, 2)
    weights = [weight for weight in backbone.parameters() if weight.requires_grad]
    found = [
        torch.autograd.grad(tokens.sin().sum(), weights, allow_unused=True, materialize_grads=True)
        for tokens in (backbone(batch(0).long, keep), picked)
    ]
    torch.testing.assert_close(*found)


def test_random_masking_draws_without_replacement_by_seed_alone() -> None:
    seeds = torch.arange(6)
    keep = random_masking(seeds, "mask", 3, 16, 8)
    assert keep is not None
    assert torch.equal(keep, keep.sort(-1).values)
    assert all(len(set(row)) == 8 for row in keep.flatten(0, 1).tolist())
    halves = [random_masking(part, "mask", 3, 16, 8) for part in seeds.split(3)]
    assert torch.equal(torch.cat([half for half in halves if half is not None]), keep)
    assert random_masking(seeds, "mask", 3, 16, 16) is None


# --- tubelets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_tubelets_are_a_convolution_over_time_and_space(tubelet: int) -> None:
    backbone = without_blocks(Backbone(replace(TINY, tubelet=tubelet)))
    backbone.vit.norm = nn.Identity()
    nn.init.zeros_(backbone.vit.pos_embed)
    frames = batch(0, frames=6).long
    normalised = rearrange((frames - backbone.mean.view(3)) / backbone.std.view(3), "b t h w c -> b c t h w")
    projection = backbone.vit.patch_embed.proj
    kernel = rearrange(projection.weight, "d (t c) p q -> d c t p q", t=tubelet)
    expected = nn.functional.conv3d(normalised, kernel, projection.bias, stride=(tubelet, 8, 8))
    torch.testing.assert_close(backbone(frames), rearrange(expected, "b d u r c -> b (u r c) d"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tubelet_of_one_frame_repeated_is_the_image(name: str) -> None:
    image = moved(Backbone(replace(TINY, name=name)))
    video = Backbone(replace(TINY, name=name, tubelet=3))
    video.load(image.vit.state_dict())
    frames = batch(0).long
    torch.testing.assert_close(video(frames.repeat_interleave(3, dim=1)), image(frames))


def test_weights_made_for_tubelets_load_as_they_are() -> None:
    source, loaded = (Backbone(replace(TINY, tubelet=2)) for _ in range(2))
    loaded.load(source.vit.state_dict())
    assert all(torch.equal(value, source.vit.state_dict()[key]) for key, value in loaded.vit.state_dict().items())
    with pytest.raises(ValueError, match=r"of another shape, as 'patch_embed.proj.weight'"):
        Backbone(replace(TINY, tubelet=3)).load(source.vit.state_dict())


def test_timms_own_weights_are_spread_over_tubelets_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, patch_size=8
    ).state_dict()
    save_file(source, tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=overlay))
    downloaded = Backbone(replace(TINY, weights="timm", tubelet=2)).vit.state_dict()
    own = Backbone(replace(TINY, tubelet=2))
    own.load(source)
    for key, value in own.vit.state_dict().items():
        torch.testing.assert_close(downloaded[key], value, msg=key)


def test_frames_that_tubelets_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"backbone.tubelet is 2: give a divisor of the 3 frames of a clip, or change"):
        Backbone(replace(TINY, tubelet=2))(batch(0).long)
    assert Backbone(replace(TINY, tubelet=2)).steps(ClipConfig().frames) == 8
    with pytest.raises(ValueError, match=r"backbone.tubelet is 0: give at least 1"):
        BackboneConfig(tubelet=0)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ending"), [*((name, "safetensors") for name in FAMILIES), (FAMILIES[0], "pt")])
def test_own_weights_are_read_and_resized(tmp_path: Path, name: str, ending: str) -> None:
    """The file has what comes after the blocks too, as timm's own."""
    shape = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
    source = timm.create_model(name, img_size=32, num_classes=5, **shape)
    path = str(tmp_path / f"vit.{ending}")
    if ending == "pt":
        torch.save({"model": source.state_dict(), "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    config = replace(TINY, name=name)
    loaded = Backbone(replace(config, weights=path))
    for key, value in loaded.vit.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    larger = VideoModel(replace(MODEL, backbone=replace(config, frame_size=64)))
    larger.load_backbone(read_weights(path))
    assert larger.backbone.patches == 64
    assert torch.equal(larger.backbone.vit.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    backbone = Backbone(TINY)
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


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny", "timm has no such model"),
        ("vit_tiny_patch16_224.imagenet", r"Invalid pretrained tag \(imagenet\) .* Leave out what follows the dot"),
        ("resnet18", "timm cannot build it with"),
    ],
)
def test_models_that_timm_cannot_build_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone.name is '{name}': .*{message}"):
        Backbone(replace(TINY, name=name))


@pytest.mark.parametrize(
    "name",
    [
        # Positions that are added inside the blocks.
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        # Patches laid out in another manner.
        "naflexvit_base_patch16_gap",
        "samvit_base_patch16",
        # Convolutions before the blocks.
        "vit_tiny_r_s16_p8_224",
    ],
)
def test_models_that_cannot_be_masked_stay_frozen(name: str) -> None:
    with pytest.raises(ValueError, match=f"backbone.frozen is False: {name} .* is no plain Vision Transformer and can"):
        Backbone(replace(TINY, name=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_size": 36}, "backbone.frame_size is 36: give a multiple of the patch size, 8"),
        ({"weights": "none.pt"}, "backbone.weights is 'none.pt': there is no such file"),
        ({"num_heads": 3}, "backbone.name is 'vit_tiny_patch16_224': timm cannot build it with .*'num_heads': 3"),
    ],
)
def test_backbone_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(replace(TINY, **changes))  # type: ignore[arg-type]


def test_frames_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"frames are \(1, 2, 16, 16, 3\): the model .* wants \(B, T, 32, 32, 3\)"):
        Backbone(TINY)(torch.zeros(1, 2, 16, 16, 3))
