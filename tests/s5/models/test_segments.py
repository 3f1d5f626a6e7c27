"""Embeddings of segments: made by a whole video model, read by another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s5.models.segments import SegmentEncoder
from s5.models.video_model import VideoModel
from tests.s5.toys import MODEL

FRAMES, COUNT = 3, 4


def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, COUNT * FRAMES, 32, 32, 3), dtype=torch.uint8)


def test_each_segment_has_the_features_of_its_clip() -> None:
    model = VideoModel(MODEL, 5).eval()
    encoder = SegmentEncoder(model, FRAMES).eval()
    clips = frames()
    with torch.no_grad():
        found = encoder(clips)
        for video, embeddings in zip(clips, found, strict=True):
            for number, embedding in enumerate(embeddings):
                clip = video[number * FRAMES : (number + 1) * FRAMES]
                torch.testing.assert_close(embedding, model.encode(clip[None]).features_BD[0])
    assert found.shape == (2, COUNT, encoder.width)
    assert encoder.tokens == 1


@pytest.mark.parametrize("name", ["s5", "lst"])
def test_a_decoder_reads_their_sequence(name: str) -> None:
    encoder = SegmentEncoder(VideoModel(MODEL).eval(), FRAMES)
    decoder = replace(MODEL.decoder, name=name, width=16, attention=replace(MODEL.decoder.attention, heads=2))
    settings = encoder.settings
    head = VideoModel(replace(MODEL, backbone=settings, decoder=decoder), 7).eval()
    assert not [name for name in head.state_dict() if name.startswith("backbone.")]
    embeddings = encoder(frames())[:, :, None]
    logits = head(embeddings).logits_BC
    assert logits.shape == (2, 7)
    # The order of the segments tells.
    assert not torch.allclose(logits, head(embeddings.flip(1)).logits_BC, atol=1e-6)
    with pytest.raises(ValueError, match="the model reads imported features of 'segments'; give those"):
        head(frames())
    with pytest.raises(ValueError, match=r"tokens are \(2, 4, 2, 4\): the backbone gives \(B, U, 1, 4\)"):
        head(embeddings.expand(-1, -1, 2, -1))
