"""Settings of stage `sweep`: what varies, how it is searched, and the trials' own settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.shared import OutFolder, TrackingConfig
from pipelines.config.stages import FinetuneConfig, PretrainConfig
from s5.config import require


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Sweep settings of pretraining and fine-tuning with Ray Tune, one trial a combination and seed."""

    out: OutFolder = "out/sweep"
    """Folder for the trials, sweep.parquet, best/ and result.json; a second start with the same folder resumes, and
    with more values, samples, seeds or epochs extends the sweep."""
    space: tuple[str, ...] = ("lsmcl.mask_ratio=0.25,0.5,0.75", "clips.frames=8,16")
    """What varies: `key=value,value,...` (a list is `[a,b]`), `key=uniform(low,high)`, `key=loguniform(low,high)` or
    `key=choice(value:weight,value:weight)`; the name of a ready space, such as mask-ratio; or a YAML or JSON file of
    keys with a list of values or one of these texts. A key of both stages, such as clips.frames, is set in both;
    `pretrain.KEY` in one."""
    search: Literal["grid", "random", "tpe", "pbt"] = "grid"
    """`grid`: every combination, of ranges `samples` draws for each; `random`: `samples` different settings, drawn;
    `tpe`: `samples` settings that Optuna's TPE proposes from what the earlier ones reached (extra `optuna`);
    `pbt`: population-based training of `samples` members in one stage: at each evaluation the worst quarter takes over
    the weights of the best, and goes on with values that are changed a little or drawn anew."""
    samples: int = 1
    """Draws, or members of a population: see `search`."""
    seeds: int = 1
    """Seeds that each setting is trained with, from `loop.seed` on: settings are compared by their mean."""
    stages: Literal["pretrain", "finetune", "pretrain+finetune"] = "pretrain+finetune"
    """What a trial runs. Trials whose pretraining is the same do it once."""
    metric: str = ""
    """Metric to compare; empty for `val/accuracy` (`val/mse` in regression, `val/loss` in task distant) or, after
    pretraining alone, `knn/top1`; `linear/top1` needs pretrain.probe linear or both."""
    against_seconds: bool = False
    """Weigh the metric against the seconds of a trial: `tpe` looks for settings that are good for their seconds. The
    result says of every setting whether another one beats it in both."""
    concurrent_trials: int = 0
    """Trials that run at once; 0 for as many as the cluster holds."""
    early_stopping: bool = False
    """Stop poor trials early, by the evaluations of the last stage (each `loop.evaluate_every` epochs). A sweep that is
    resumed compares from then on."""
    stopping_rule: Literal["asha", "median"] = "asha"
    """With `early_stopping`. `asha`: the better ones of each rung of evaluations go on; `median`: those that are no
    worse than the median of the others' means so far."""
    seed: int = 0
    """Seed of the drawn values."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Settings of every trial's pretraining."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings of every trial's fine-tuning."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the sweep and its trials are logged."""

    def __post_init__(self) -> None:
        require(len(self.space) > 0, "space", self.space, "give at least one key=value,value")
        for name in ("samples", "seeds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        remedy = f"give the number of settings that --search {self.search} tries"
        require(self.search == "grid" or self.samples > 1, "samples", self.samples, remedy)
        require(self.concurrent_trials >= 0, "concurrent_trials", self.concurrent_trials, "give 0 or more")
        remedy = "early stopping compares one metric; leave one of them out"
        require(not (self.early_stopping and self.against_seconds), "against_seconds", True, remedy)
        remedy = "early_stopping leaves the lucky seeds of each setting, whose mean says little; leave one of them out"
        require(not self.early_stopping or self.seeds == 1, "seeds", self.seeds, remedy)
        for stage, settings in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            stop, remedy = settings.loop.stop_after_epoch, "trials train to their end, for comparison; give 0"
            require(stop == 0, f"{stage}.loop.stop_after_epoch", stop, remedy)
        if self.search == "pbt":
            self._require_population()

    def _require_population(self) -> None:
        remedy = "members of a population take over each other's weights; give 1, or another --search"
        require(self.seeds == 1, "seeds", self.seeds, remedy)
        remedy = "a population replaces its worst members instead; leave it out, or give another --search"
        require(not self.early_stopping, "early_stopping", True, remedy)
        remedy = "a population compares one metric; leave it out, or give --search tpe"
        require(not self.against_seconds, "against_seconds", True, remedy)
        remedy = "a population trains in one stage; give --stages pretrain or finetune"
        require("+" not in self.stages, "stages", self.stages, remedy)
        loop = (self.pretrain if self.stages == "pretrain" else self.finetune).loop
        remedy = "a population is compared after epochs; give loop.epochs in its place"
        require(loop.steps == 0, f"{self.stages}.loop.steps", loop.steps, remedy)
        remedy = f"a population is compared before epoch {loop.epochs}, its last; give a smaller number, of at least 1"
        name = f"{self.stages}.loop.evaluate_every"
        require(0 < loop.evaluate_every < loop.epochs, name, loop.evaluate_every, remedy)
