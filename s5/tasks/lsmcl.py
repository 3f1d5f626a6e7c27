"""LSMCL: long-short masked contrastive learning (arXiv 2303.14526), with MoCo v3's heads and recipe (2104.02057).

Shapes: B clips of this worker, G clips of all workers, T frames, U time steps, N tokens of a step, K patches of a step
or tokens of a clip that are kept, L tokens of a clip, D width of an embedding.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s5 import distributed
from s5.batch import ClipBatch
from s5.config import LSMCLConfig, ModelConfig, ViewsConfig
from s5.models.backbone import random_masking
from s5.models.video_model import VideoModel
from s5.tasks.augment import augment


def info_nce(query_BD: Tensor, key_GD: Tensor, temperature: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the InfoNCE loss, mean over the queries, and the cosine similarities (B, G), both in fp32.

    The positive of query `i` is key `first + i`; all other keys are negatives. The loss is scaled by twice the
    temperature, as in MoCo v3's algorithm 1, so that its gradient does not depend on it to first order.
    """
    # Autocast would take the product in half precision, where similarities of 1024 keys have many ties.
    with torch.autocast(query_BD.device.type, enabled=False):
        similarity_BG = F.normalize(query_BD.float(), dim=-1) @ F.normalize(key_GD.float(), dim=-1).T
        target_B = first + torch.arange(len(query_BD), device=query_BD.device)
        loss = F.cross_entropy(similarity_BG / temperature, target_B) * 2 * temperature
    return loss, similarity_BG


class Head(nn.Sequential):
    """MoCo v3's MLP: linear layers with batch normalisation, ReLU between them, none after the last.

    Long and short clips are normalised each on their own, but share the products: with a small batch most of the time
    goes into reading the weights.
    """

    def __init__(self, widths: list[int], last_affine: bool) -> None:
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            last = i == len(widths) - 2
            layers.append(nn.Linear(width_in, width_out, bias=False))
            layers.append(distributed.BatchNorm(width_out, affine=not last or last_affine))
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, x_VBD: Tensor) -> Tensor:
        """(V, B, D) -> (V, B, D'), for V kinds of clips."""
        for layer in self:
            alone = isinstance(layer, distributed.BatchNorm)
            x_VBD = torch.stack([layer(x_BD) for x_BD in x_VBD]) if alone else layer(x_VBD)
        return x_VBD


def embedding_spread(x_BD: Tensor) -> Tensor:
    """Return the spread of embeddings: 1 where directions are independent and random, 0 where all are one point."""
    spread: Tensor = F.normalize(x_BD.float(), dim=-1).std(0, correction=0).mean() * x_BD.shape[-1] ** 0.5
    return spread


class Views(NamedTuple):
    """All long, then all short clips of a batch, as both branches see them."""

    clips: Tensor
    """Frames (2B, T, H, W, C) or cached tokens (2B, U, N, D)."""
    seeds_2B: Tensor
    """Seeds of the clips' noise."""
    keep_2BUK: Tensor | None
    """Patches of each time step that masking leaves; None for all."""
    keep_2BK: Tensor | None
    """Tokens of each clip that masking leaves; None for all."""
    tokens_2BLD: Tensor | None
    """The tokens left, where the backbone is frozen: the same for both branches, so that it encodes a frame once."""


class LSMCL(nn.Module):
    """Online and momentum branch over long and short clips; the task of pretraining.

    `q = predictor(projector(encoder(R_mask(x))))`, `k` the same without the predictor and with moving averages of the
    weights. Long and short clips are queries and keys in turn. Masked patches are dropped before the backbone, masked
    tokens after it. A frozen backbone, the same in both branches, encodes each clip once for both.
    """

    def __init__(self, model: ModelConfig, config: LSMCLConfig, views: ViewsConfig | None = None) -> None:
        """Build both branches.

        Raises:
            ValueError: patches are to be masked for a backbone that sees whole frames.
        """
        super().__init__()
        self.config = config
        self.views = views or ViewsConfig()
        # Random masking stands in for the mask generator while pretraining, so the pyramid keeps all tokens.
        selection = replace(model.decoder.selection, generator="none")
        self.encoder = VideoModel(replace(model, decoder=replace(model.decoder, selection=selection)))
        self.encoder.backbone.check_masking(config.mask_on == "patches")
        if config.freeze_patches and not model.backbone.frozen:
            self.encoder.backbone.vit.patch_embed.requires_grad_(False)
        width = self.encoder.decoder.out_width
        self.projector = Head([width, config.hidden, config.hidden, config.dim], last_affine=False)
        self.predictor = Head([config.dim, config.hidden, config.dim], last_affine=True)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.momentum = config.momentum

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Load the frame encoder's weights into both branches, which start equal.

        Raises:
            ValueError: the weights are those of another model.
        """
        self.encoder.load_backbone(state)
        self.momentum_encoder.load_backbone(state)

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return scalars: the loss of a batch of pairs, and metrics that show whether the embeddings collapse."""
        views = self._views(batch)
        encoded = {"features": self._features(self.encoder, views)}
        with torch.no_grad():
            targets = {"features": self._features(self.momentum_encoder, views)}
        return self.losses(encoded, targets, batch)

    def encode(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return what of the online branch belongs to each pair alone: its long and short clip's features (B, 2, D)."""
        return {"features": self._features(self.encoder, self._views(batch))}

    @torch.no_grad()
    def targets(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the same of the momentum branch, without gradient."""
        return {"features": self._features(self.momentum_encoder, self._views(batch))}

    def losses(
        self, encoded: Mapping[str, Tensor], targets: Mapping[str, Tensor], batch: ClipBatch
    ) -> dict[str, Tensor]:
        """Return the scalars of a whole batch, whose pairs are one another's negatives, from what encodes each pair."""
        queries_VBD = self.predictor(self.projector(encoded["features"].transpose(0, 1)))
        with torch.no_grad():
            projected_VBD = self.momentum_projector(targets["features"].transpose(0, 1)).float()
            keys = [distributed.gather(x_BD, batch.total) for x_BD in projected_VBD]
        return self._losses(list(queries_VBD), keys)

    def _views(self, batch: ClipBatch) -> Views:
        assert batch.short is not None, "LSMCL needs pairs of clips"
        long = augment(batch.long, batch.seeds, "long", self.views)
        clips = torch.cat([long, augment(batch.short, batch.seeds, "short", self.views)])
        masks = [self._mask(batch, view) for view in ("long", "short")]
        keep = None if masks[0] is None else torch.cat(cast(list[Tensor], masks))
        keep_2BUK, keep_2BK = (keep, None) if self.config.mask_on == "patches" else (None, keep)
        tokens_2BLD = None
        if self.encoder.config.backbone.frozen:
            with torch.no_grad():
                tokens_2BLD = self.encoder.tokens(clips, keep_2BUK, keep_2BK)
        return Views(clips, torch.cat([batch.seeds, ~batch.seeds]), keep_2BUK, keep_2BK, tokens_2BLD)

    def _features(self, encoder: VideoModel, views: Views) -> Tensor:
        tokens_2BLD = views.tokens_2BLD
        if tokens_2BLD is None:
            tokens_2BLD = encoder.tokens(views.clips, views.keep_2BUK, views.keep_2BK)
        out = encoder.decode(tokens_2BLD, views.seeds_2B, encoder.steps(views.clips), views.keep_2BK)
        return torch.stack(out.features_BD.chunk(2), dim=1)

    def _mask(self, batch: ClipBatch, view: str) -> Tensor | None:
        """Patches (B, U, K) of each time step, or tokens (B, K) of each clip, that stay; None where all do."""
        backbone, ratio = self.encoder.backbone, self.config.mask_ratio
        steps = self.encoder.steps(batch.long)
        if self.config.mask_on == "patches":
            return random_masking(batch.seeds, f"{view}/mask", steps, backbone.patches, backbone.kept(ratio))
        length = steps * backbone.tokens
        keep_B1K = random_masking(batch.seeds, f"{view}/mask", 1, length, max(1, round(length * (1 - ratio))))
        return None if keep_B1K is None else keep_B1K[:, 0]

    def _losses(self, queries: list[Tensor], keys: list[Tensor]) -> dict[str, Tensor]:
        total = len(keys[0])
        first = distributed.share_of(total, distributed.rank(), distributed.world_size()).start
        query_long, query_short = queries
        key_long, key_short = keys
        # Short predicts long and long predicts short.
        pairs = [(query_short, key_long), (query_long, key_short)]
        losses, positives, negatives, hits = [], [], [], []
        for query_BD, key_GD in pairs:
            loss, similarity_BG = info_nce(query_BD, key_GD, self.config.temperature, first)
            own = similarity_BG.detach().diagonal(first)
            others = similarity_BG.shape[1] - 1
            losses.append(loss)
            positives.append(own.mean())
            negatives.append((similarity_BG.detach().sum(1) - own).mean() / max(others, 1))
            hits.append((similarity_BG.argmax(1) == first + torch.arange(len(own), device=own.device)).float().mean())
        scalars = {
            "loss": losses[0] + losses[1],
            "top1": torch.stack(hits).mean(),
            "similarity_positive": torch.stack(positives).mean(),
            "similarity_negative": torch.stack(negatives).mean(),
            "embedding_spread": embedding_spread(torch.cat(keys)),
        }
        weight = distributed.weight(len(query_long), total)
        return {name: value * weight for name, value in scalars.items()}

    def before_step(self, progress: float) -> None:
        """Do nothing: only the momentum follows a schedule, after the step."""

    @torch.no_grad()
    def after_step(self, progress: float) -> dict[str, float]:
        """Move the momentum branch towards the online one; `progress` from 0 to 1 raises the momentum to 1 (cosine)."""
        self.momentum = 1 - (1 - self.config.momentum) * (math.cos(math.pi * progress) + 1) / 2
        pairs = ((self.encoder, self.momentum_encoder), (self.projector, self.momentum_projector))
        for online, average in pairs:
            # What is frozen is the same in both.
            moving = [(a, o) for a, o in zip(average.parameters(), online.parameters(), strict=True) if o.requires_grad]
            if moving:
                torch._foreach_lerp_([a for a, _ in moving], [o for _, o in moving], 1 - self.momentum)
        return {"momentum": self.momentum}


def check_lsmcl(model: ModelConfig, config: LSMCLConfig) -> None:
    """Build the task without memory for its weights, to find settings that do not fit together.

    Raises:
        ValueError: names the setting and the remedy.
    """
    with torch.device("meta"):
        LSMCL(replace(model, backbone=replace(model.backbone, weights="")), config)
