"""Fine-tuning on random views, and evaluation without."""

from __future__ import annotations

import torch

from s5.config import ViewsConfig
from s5.evaluation import inference
from s5.models.video_model import VideoModel
from s5.tasks.augment import augment
from s5.tasks.supervised import Supervised
from tests.s5.toys import MODEL, batch

VIEWS = ViewsConfig(flip=0.5, jitter=0.4, grey=0.5, blur=(0.5, 0.0), solarise=(0.5, 0.0))


def test_training_sees_views_and_evaluation_does_not() -> None:
    model, one = VideoModel(MODEL, 2).eval(), batch(0)
    plain, task = Supervised(model, "class"), Supervised(model, "class", VIEWS)
    seen = augment(one.long, one.seeds, "long", VIEWS)
    assert torch.equal(task.encode(one)["logits"], model(seen, one.seeds).logits_BC)
    assert torch.equal(plain.encode(one)["logits"], model(one.long, one.seeds).logits_BC)
    assert not torch.equal(task.encode(one)["logits"], plain.encode(one)["logits"])
    scores = inference.scores(task.model, "class")(one)
    assert torch.equal(scores, model(one.long).logits_BC.softmax(-1))
