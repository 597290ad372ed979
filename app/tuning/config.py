"""Settings of the tuning stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig
from app.training.config import TrainConfig
from app.tuning import space
from app.tuning.space import Distribution, Overrides

PBT_KEYS = tuple(  # what a checkpoint does not hold; the rest of the optimizer's settings comes back with its states
    f"optimizer.{name}" for name in ("learning_rate", "schedule", "decay_ratio", "final_learning_rate_ratio")
)
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_heads", "num_key_value_heads")


class AshaConfig(Config):
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934): trials that lag behind end early."""

    grace_steps: int = Field(50, ge=1, description="steps that every trial gets; the first rung")
    reduction_factor: int = Field(2, ge=2, description="the best 1/factor go on; the next rung is factor times as far")


class PbtConfig(Config):
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846): the worst go on from the best."""

    interval_steps: int = Field(100, ge=1, description="steps of a generation")
    share: float = Field(0.25, gt=0, le=0.5, description="of the trials: so many of the worst take over from the best")


class TuneConfig(RunConfig):
    """Settings of `tune_model`."""

    train: TrainConfig = Field(TrainConfig(), description="what the trials start from: a train_model YAML")
    space: dict[str, Distribution] = Field(
        description="dotted key of train -> one of {uniform, log_uniform, integer, log_integer: [low, high]}, "
        "{choice: [...]}"
    )
    times_narrower: int = Field(
        1,
        ge=1,
        description="trials train a model so many times narrower than train.model; best.yaml has the wide one, the "
        "learning rate transferred",
    )
    trials_uri: str = Field("trials", description="the sweep's private folder; a rerun resumes from it")
    output_uri: str = Field("sweep", description="where the report and best.yaml go")
    search: Literal["random", "grid", "optuna"] = Field("random", description="who proposes the trials")
    num_trials: int = Field(8, ge=1, description="trials, trial 0 included; a grid has as many as it has")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="asha: trials that lag behind end early; pbt: they go on from better ones"
    )
    asha: AshaConfig = AshaConfig()
    pbt: PbtConfig = PbtConfig()
    metric: Literal["held_out_bits_per_byte", "replay_bits_per_byte"] = Field(
        "held_out_bits_per_byte", description="what is to be low; measured each train.evaluation_interval_steps"
    )
    max_concurrent_trials: int = Field(
        1, ge=1, description="trials at once, each on its own workers; with 1, a sweep is the same each time"
    )
    max_trial_failures: int = Field(1, ge=0, description="how often a trial that failed is tried again")
    keep_trials: Literal["best", "all"] = Field("best", description="whose checkpoints and models stay at the end")
    seed: int = Field(0, ge=0, description="of the values of the trials; train.seed is that of each training")

    @model_validator(mode="after")
    def _fits_together(self) -> TuneConfig:
        if not self.space:
            raise ValueError("space: name at least one key of train")
        space.refuse(self.space, self.train)
        if self.train.validation != "inline":
            raise ValueError("train.validation must be inline: trials are compared at the same steps")
        if self.metric == "replay_bits_per_byte" and not self.train.replay.tokens_uri:
            raise ValueError("metric replay_bits_per_byte needs train.replay.tokens_uri")
        if self.scheduler == "asha" and self.asha.grace_steps < self.train.evaluation_interval_steps:
            raise ValueError(
                f"asha.grace_steps ({self.asha.grace_steps}) must not be below train.evaluation_interval_steps "
                f"({self.train.evaluation_interval_steps}): there is no figure before"
            )
        if self.scheduler == "pbt":
            self._suits_pbt()
        if self.times_narrower > 1:
            self._refuse_narrow()
        for number, overrides in self.planned():
            try:
                self.trained.with_overrides(overrides)
                self.chosen(overrides)
            except ValueError as error:
                raise ValueError(f"trial {number} of the space {overrides}: {error}") from None
        return self

    def _suits_pbt(self) -> None:
        if self.search != "random" or self.num_trials < 2:
            raise ValueError(
                "scheduler pbt needs search random and num_trials of 2 or more: it proposes the rest itself"
            )
        for key in self.space:
            if key not in PBT_KEYS:
                raise ValueError(f"space.{key}: scheduler pbt may only change {', '.join(PBT_KEYS)} on the way")
        interval, measured = self.pbt.interval_steps, self.train.evaluation_interval_steps
        if interval % measured or interval >= self.train.num_steps:
            raise ValueError(
                f"pbt.interval_steps ({interval}) must be a multiple of train.evaluation_interval_steps ({measured}) "
                f"and below train.num_steps ({self.train.num_steps})"
            )

    def _refuse_narrow(self) -> None:
        """Raise ValueError where a narrow model would not stand for the wide one."""
        wide = self.train.model
        if wide.architecture == "deepseek_v3":
            raise ValueError(
                "times_narrower: not with train.model.architecture deepseek_v3, whose latent sizes would stay"
            )
        if self.train.init_from_uri or self.train.optimizer.found_at_hidden_size:
            raise ValueError(
                "times_narrower: trials train fresh models and find the learning rate themselves; leave "
                "train.init_from_uri and train.optimizer.found_at_hidden_size unset"
            )
        for name in _WIDTHS:
            if f"model.{name}" in self.space:
                raise ValueError(f"space.model.{name}: times_narrower sets it")
            if getattr(wide, name) % self.times_narrower:
                raise ValueError(f"times_narrower ({self.times_narrower}) must divide train.model.{name}")

    @property
    def trained(self) -> TrainConfig:
        """What the trials start from: `train`, or the same with a narrow model whose heads are as wide.

        Matrices of the wide one take less of the learning rate in proportion (training/engine.py says why).
        """
        if self.times_narrower == 1:
            return self.train
        model = self.train.model
        narrow = {f"model.{name}": getattr(model, name) // self.times_narrower for name in _WIDTHS}
        return self.train.with_overrides(narrow | {"model.head_size": model.head_width})

    def chosen(self, values: Overrides) -> TrainConfig:
        """The settings to train with after the sweep: those of `train` with the values of the best trial."""
        found_at = self.trained.model.hidden_size if self.times_narrower > 1 else 0
        transfer = {"optimizer.found_at_hidden_size": found_at} if found_at else {}
        return self.train.with_overrides(values | transfer | {"storage_uri": self.storage_uri})

    def planned(self) -> list[tuple[int, Overrides]]:
        """Number and values of the trials that are known before any has run: all but Optuna's.

        Trial 0 is `train` as it stands, so that the gain over it is measured.
        """
        if self.search == "optuna":
            return [(0, {})]
        if self.search == "grid":
            return list(enumerate([{}, *space.grid(self.space)]))
        start = self._start_values() if self.scheduler == "pbt" else {}  # a population passes values on
        drawn = [space.sample(self.space, self.seed, number) for number in range(1, self.num_trials)]
        return list(enumerate([start, *drawn]))

    def _start_values(self) -> Overrides:
        values: Overrides = {}
        for key in self.space:
            found: Any = self.train
            for part in key.split("."):
                found = getattr(found, part)
            values[key] = found
        return values

    @property
    def total_trials(self) -> int:
        """How many there will be."""
        return self.num_trials if self.search == "optuna" else len(self.planned())

    @property
    def last_step(self) -> int:
        """The most steps that a trial may have."""
        steps = self.space.get("num_steps")
        return max(steps.ends) if steps else self.train.num_steps

    def trial_uri(self, number: int) -> str:
        """The folder of a trial."""
        return f"{self.resolve(self.trials_uri)}/{number:04d}"

    def generation_uri(self, number: int, generation: int) -> str:
        """The folder of what a trial does in one generation of a population."""
        return f"{self.trial_uri(number)}/generation-{generation:03d}"

    @property
    def generation_ends(self) -> list[int]:
        """The steps after which the generations of a population end."""
        inner = range(self.pbt.interval_steps, self.train.num_steps, self.pbt.interval_steps)
        return [*inner, self.train.num_steps]

    def trial_config(self, uri: str, overrides: Overrides) -> TrainConfig:
        """The settings of a training in a trial's folder. Raises ValueError when the values do not go together."""
        places = {"checkpoints_uri": f"{uri}/checkpoints", "output_uri": f"{uri}/model", "overwrite": False}
        return self.trained.with_overrides(overrides | {"storage_uri": self.storage_uri, **places})

    def plan(self) -> list[str]:
        """Trials, workers and where the trials are."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        at_once, workers = min(self.max_concurrent_trials, self.total_trials), self.train.num_workers
        how = self.search if self.scheduler == "none" else f"{self.search}, {self.scheduler}"
        return [
            f"{self.total_trials} trials ({how}) over {', '.join(self.space)}; trial 0 is train as it stands",
            *self._transfer_plan(),
            *self._generations_plan(),
            f"{at_once} at once on {workers} workers each: {at_once * workers} GPUs, or CPUs where there is no GPU",
            *(f"trial {number}: {overrides}" for number, overrides in self.planned() if overrides),
            f"resume the trials in {self.resolve(self.trials_uri)}, if any",
            *states(self),
        ]

    def _transfer_plan(self) -> list[str]:
        if self.times_narrower == 1:
            return []
        narrow, wide = self.trained.model.hidden_size, self.train.model.hidden_size
        return [f"a trial's model is {narrow} wide; best.yaml is for {wide}, with its learning rate transferred"]

    def _generations_plan(self) -> list[str]:
        if self.scheduler != "pbt":
            return []
        ends = ", ".join(map(str, self.generation_ends))
        return [
            f"{len(self.generation_ends)} generations, to steps {ends}; a copy of each trial's checkpoint between them"
        ]
