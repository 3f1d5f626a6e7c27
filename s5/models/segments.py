"""Embeddings of segments in place of tokens of frames: a video model encodes each segment, another one the video.

This is the long-term model of distant supervision (arXiv 2201.10990): the encoder that narration trained embeds
segments that are evenly cut, and a decoder with a head reads their sequence.

Shapes: B batch, U segments, T frames of a segment, D width of an embedding.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from s5.config import SEGMENTS, BackboneConfig
from s5.models.video_model import VideoModel


class SegmentEncoder(nn.Module):
    """A trained video model that makes one token of each segment, where a `Backbone` makes some of each frame."""

    tokens = 1

    def __init__(self, model: VideoModel, frames: int) -> None:
        """Take a model as it is.

        Args:
            model: the video model; its head is not used.
            frames: frames T of a segment.
        """
        super().__init__()
        self.model, self.frames = model.requires_grad_(False), frames
        self.config = model.config.backbone
        self.width = model.decoder.out_width

    @property
    def mean(self) -> Tensor:
        """Mean of the colours, 0 to 255, that is subtracted."""
        return self.model.backbone.mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of the colours that is divided by."""
        return self.model.backbone.std

    @property
    def settings(self) -> BackboneConfig:
        """Settings of a backbone whose tokens these embeddings are."""
        return BackboneConfig(name=SEGMENTS, tokens=self.tokens, width=self.width, frozen=True)

    def forward(self, frames_BLHWC: Tensor) -> Tensor:
        """Return the embeddings (B, U, D) of segments whose frames follow each other, L = U x T."""
        batch = len(frames_BLHWC)
        clips = rearrange(frames_BLHWC, "b (u t) h w c -> (b u) t h w c", t=self.frames)
        return rearrange(self.model.encode(clips).features_BD, "(b u) d -> b u d", b=batch)
