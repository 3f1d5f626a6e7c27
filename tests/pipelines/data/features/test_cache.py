"""Which manifests, models and backbones cached features serve, and what is said to the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines import storage
from pipelines.config import FeaturesConfig, FinetuneConfig, override
from pipelines.data.features.cache import VIDEOS, check_fresh, unlabelled, with_imported
from pipelines.data.manifest import digest
from pipelines.errors import UserError
from s5.config import BackboneConfig, ModelConfig
from s5.models.video_model import VideoModel
from tests.pipelines.data.features.imported import TOKENS, WIDTH, manifest, meta_of, video

OF_FEATURES, OTHER = manifest(video("a", 4.0)), manifest(video("b", 4.0))
META = replace(meta_of(), manifest=digest(OF_FEATURES))


def features_folder(tmp_path: Path) -> str:
    storage.write_json(str(tmp_path / "features.json"), META.__dict__)
    return str(tmp_path)


def test_imported_features_stand_in_for_the_frame_encoder(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    config = with_imported(BackboneConfig(name="vit-l", frozen=True), folder)
    assert (config.tokens, config.width) == (TOKENS, WIDTH)
    model = VideoModel(ModelConfig(backbone=config), 4)
    assert not any(name.startswith("backbone") for name in model.state_dict())
    assert model(torch.zeros(2, 5, TOKENS, WIDTH).half()).logits_BC.shape == (2, 4)
    with pytest.raises(ValueError, match=r"frames are given: the model reads imported features of 'vit-l'; give those"):
        model(torch.zeros(1, 5, 224, 224, 3, dtype=torch.uint8))
    check_fresh(folder, META, config, "", OF_FEATURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "swin"}, r"imported from 'vit-l', not 'swin'; give --model.backbone.name vit-l, or other features"),
        ({"tokens": TOKENS, "width": 9}, r"model.backbone.width is 8 there, not 9; give 8"),
        ({"cls_token": True}, r"imported features are taken as they are; give --model.backbone.no-cls-token$"),
        ({"cls_token": True, "tubelet": 2}, r"give --model.backbone.no-cls-token and --model.backbone.tubelet 1$"),
    ],
)
def test_features_of_another_kind_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "vit-l", "frozen": True}
    with pytest.raises(UserError, match=message):
        with_imported(BackboneConfig(**(settings | changes)), features_folder(tmp_path))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["vit-l", "swin"])
def test_a_model_with_a_frame_encoder_reads_no_imported_features(name: str, frozen: bool, tmp_path: Path) -> None:
    """Nor where name and sizes agree: what made the features may have had other weights."""
    with pytest.raises(UserError, match=rf"imported ones of 'vit-l', .* a frame encoder of its own, '{name}'; give"):
        check_fresh(features_folder(tmp_path), META, BackboneConfig(name=name, frozen=frozen), "", OF_FEATURES)


def test_another_manifest_and_missing_features_are_refused(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    with pytest.raises(UserError, match=r"from another manifest, or it has changed since"):
        check_fresh(folder, META, with_imported(BackboneConfig(name="vit-l", frozen=True), folder), "", OTHER)
    changes = {"model.backbone.frozen": True, "model.backbone.tokens": 3, "model.backbone.width": 8}
    with pytest.raises(UserError, match=r"backbone.tokens is 3: imported features stand in for the frame encoder then"):
        override(FinetuneConfig(), changes)
    with pytest.raises(UserError, match=r"backbone is '': name what made the features of --import"):
        override(FeaturesConfig(), {"import_": folder})


def check(folder: str, videos: pa.Table) -> None:
    check_fresh(folder, META, with_imported(BackboneConfig(name="vit-l", frozen=True), folder), "", videos)


def test_facts_of_videos_are_compared_without_labels_and_secrets(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    secret = video("s", 4.0, uri="https://user:secret@host/s.mp4?X-Amz-Signature=abc")
    stored = manifest(video("a", 4.0) | {"codec": "h264"}, video("b", 4.0), secret)
    storage.write_table(str(tmp_path / VIDEOS), unlabelled(stored))
    assert "secret" not in str(storage.read_table(str(tmp_path / VIDEOS)).to_pylist())
    check(folder, manifest(secret | {"split": "test", "label": 3}, video("b", 4.0)))
    for facts in ({"fps": 24.0}, {"width": 2}, {"codec": "h264"}, {"decoder": "pyav"}, {"end_s": 3.5}, {"uri": "/c"}):
        ((name, value),) = facts.items()
        message = rf"lacks 1 of the 1 videos or has other facts of them, such as 'b' \(its {name} is {value!r}, there "
        with pytest.raises(UserError, match=message):
            check(folder, manifest(video("b", 4.0) | facts))
    with pytest.raises(UserError, match=r"lacks 2 of the 3 videos or has other facts of them, such as 'c'; recompute"):
        check(folder, manifest(video("d", 4.0), video("c", 4.0), video("b", 4.0)))


def test_a_damaged_list_of_videos_is_a_sentence(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    storage.write_table(str(tmp_path / VIDEOS), unlabelled(manifest(video("a", 4.0))))
    whole = (tmp_path / VIDEOS).read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        (tmp_path / VIDEOS).write_bytes(content)
        with pytest.raises(UserError, match=r"features is '.*': videos.parquet is damaged \(.*\); recompute or import"):
            check(folder, OTHER)
    storage.write_table(str(tmp_path / VIDEOS), OTHER.select(["video_id"]))
    with pytest.raises(UserError, match=r"videos.parquet is damaged"):
        check(folder, manifest(video("c", 4.0)))
