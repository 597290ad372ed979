"""Tuning stage: Ray Tune runs trials, each a training run of its own, and keeps the best one's settings.

A trial is a Tune function that runs the training stage in its own folder and reports what the run measures on held-out
text. Nobody is killed to end it early: the scheduler leaves a mark, the trial asks its workers to leave and returns, so
their resources are free again. A sweep submitted again starts from trial 0 and repeats the reports that lie in the
folders (trial.py), so Tune's own state need not survive.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from app import cluster, logs, storage
from app.artifacts import Manifest, clear, find_complete, publish, read_manifest
from app.config import flatten, to_yaml
from app.training import checkpoint, record, signals
from app.training import stage as training
from app.training.config import TrainConfig
from app.training.fork import copy_run
from app.tuning import report
from app.tuning.config import TuneConfig
from app.tuning.population import Member, evolve
from app.tuning.space import Overrides
from app.tuning.trial import Trial, choose_best, join, new_scores

logger = logging.getLogger(__name__)

RECORD = "sweep.json"  # settings and data of the sweep that a folder holds
BEST = "best.yaml"
LOOK_SECONDS = 0.5
TRIAL_RESOURCES = {"memory": 1 << 20}  # Tune wants one; no CPU, for those are the workers', whom the trial waits for
_HOW_NOT_WHAT = {  # settings that a sweep may go on with when they have changed
    "storage_uri", "overwrite", "trials_uri", "output_uri", "num_trials", "max_concurrent_trials",
    "max_trial_failures", "keep_trials",
}  # fmt: skip


def run(config: TuneConfig) -> Manifest:
    """Run the sweep, or the rest of it, and write report and best config.

    Raises ValueError when inputs are missing, trials_uri holds another sweep, a trial does not fit into the cluster, or
    no trial finished.
    """
    uri = config.resolve(config.output_uri)
    train = config.trial_config(config.trial_uri(0), {})
    draft = Manifest.draft("report", uri, config, training.read_inputs(train))
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    if not read_manifest(train.resolve(train.tokens_uri), "tokens").figures["held_out"]["blocks"]:  # type: ignore[index]
        raise ValueError(f"train.tokens_uri: {train.tokens_uri} has no held-out blocks to compare trials by")
    _open_sweep(config, draft)
    cluster.connect()
    num_at_once = _num_at_once(config)
    trials = (_run_population if config.scheduler == "pbt" else _run_trials)(config, num_at_once)
    best = choose_best(trials)
    _write(config, uri, trials, best)
    manifest = publish(draft, report.figures(trials, best))
    if config.keep_trials == "best":
        for trial in trials:
            if trial is not best:
                trial.drop_weights()
    logger.info("best: trial %d, %s %.4f, %s/%s", best.number, config.metric, best.score, uri, BEST)
    return manifest


def _write(config: TuneConfig, uri: str, trials: list[Trial], best: Trial) -> None:
    """best.yaml, report.json and report.html."""
    storage.write_atomic(f"{uri}/{BEST}", to_yaml(config.chosen(best.values)).encode())
    content = report.content(trials, best, config.metric)
    storage.write_atomic(f"{uri}/report.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
    storage.write_atomic(f"{uri}/report.html", report.render(content).encode())


def _open_sweep(config: TuneConfig, draft: Manifest) -> None:
    """Begin the sweep in its folder, or make sure that the one in there is this one.

    Raises ValueError naming what differs, unless overwrite is set: then the old sweep is deleted.
    """
    how = _HOW_NOT_WHAT - ({"num_trials"} if config.scheduler == "pbt" else set())  # all of a population compete
    settings = {name: value for name, value in draft.config.items() if name not in how}
    train = settings.pop("train")
    settings |= {f"train.{name}": value for name, value in train.items() if name not in training.HOW_NOT_WHAT}
    now = {"settings": flatten(settings), "data": {name: one.digest for name, one in draft.inputs.items()}}
    trials_uri = config.resolve(config.trials_uri)
    if not record.find_same(trials_uri, RECORD, "trials_uri", now, config.overwrite):
        record.write(trials_uri, RECORD, now)


def _num_at_once(config: TuneConfig) -> int:
    """How many trials run at a time. Raises ValueError when the cluster has no room for one."""
    kind = "GPU" if cluster.has_gpu() else "CPU"
    there, needed = int(ray.cluster_resources().get(kind, 0)), config.train.num_workers
    if needed > there:
        raise ValueError(f"train.num_workers: a trial needs {needed} {kind}s, the cluster has {there}")
    fitting = min(config.max_concurrent_trials, there // needed)
    if fitting < config.max_concurrent_trials:
        logger.warning("max_concurrent_trials: %d trials at once, no more fit on %d %ss", fitting, there, kind)
    return fitting


def _run_trials(config: TuneConfig, num_at_once: int) -> list[Trial]:
    """All trials, each from its first step to its end."""
    jobs = {number: _job(config, config.trial_uri(number), number, values) for number, values in config.planned()}
    _tune(config, _Proposals(config, jobs), num_at_once)
    opened = (Trial.open(config.trial_uri(number), number) for number in range(config.total_trials))
    return [trial for trial in opened if trial]


def _run_population(config: TuneConfig, num_at_once: int) -> list[Trial]:
    """Generation after generation; the trials with what their places in the population did, one after the other."""
    members = [Member(number, 0, number, values) for number, values in config.planned()]
    done: dict[int, list[Trial]] = {member.number: [] for member in members}
    begin, ends = 0, config.generation_ends
    for generation, end in enumerate(ends):
        jobs = {member.number: _member_job(config, member, begin, end) for member in members}
        trials = [Trial.begin(job["uri"], number, job["values"]) for number, job in jobs.items()]
        has_heirs = any(Trial.open(config.generation_uri(number, generation + 1), number) for number in jobs)
        if not has_heirs and any(trial.outcome != "finished" for trial in trials):
            logger.info("generation %d of %d: to step %d", generation + 1, len(ends), end)
            _tune(config, _Proposals(config, jobs), num_at_once)
            trials = [Trial.begin(trial.uri, trial.number, trial.values) for trial in trials]
        for trial in trials:
            done[trial.number].append(trial)
        if end < config.train.num_steps:
            scores = {one.number: one.score for one in trials if one.outcome == "finished" and one.score is not None}
            members = evolve(members, scores, config.space, config.seed, config.pbt.share)
            begin = end
    return [join(parts) for parts in done.values()]


def _member_job(config: TuneConfig, member: Member, begin: int, end: int) -> dict[str, Any]:
    job = _job(config, config.generation_uri(member.number, member.generation), member.number, member.values)
    if member.generation:
        job["from_uri"] = config.generation_uri(member.parent, member.generation - 1)
    return job | {"from_step": begin, "stop_at_step": end if end < config.train.num_steps else 0}


def _job(config: TuneConfig, uri: str, number: int, values: Overrides) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"), "uri": uri, "number": number, "values": values,
        "from_uri": "", "from_step": 0, "stop_at_step": 0,
    }  # fmt: skip


def _tune(config: TuneConfig, proposals: _Proposals, num_at_once: int) -> None:
    folder = f"{config.resolve(config.trials_uri)}/tune"  # Tune's own record; nothing of ours is in it
    storage.delete(folder)
    tuner = tune.Tuner(
        tune.with_resources(_run_trial, TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=_Asha(config) if config.scheduler == "asha" else FIFOScheduler(),
            num_samples=proposals.total,
            max_concurrent_trials=num_at_once,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=config.resolve(config.trials_uri),
            failure_config=tune.FailureConfig(max_failures=config.max_trial_failures),
            callbacks=[_Watch()],
            verbose=0,
        ),
    )
    tuner.fit()


def _run_trial(job: dict[str, Any]) -> None:
    """What Tune runs for a trial: repeats the reports that are there, then trains on and reports what is new."""
    logs.configure()
    config = TuneConfig.model_validate(job["config"])
    trial = Trial.begin(job["uri"], job["number"], job["values"])
    for known in trial.reports:
        tune.report(known)
    if trial.outcome == "finished" or trial.was_ended():
        return
    train = config.trial_config(trial.uri, trial.values).with_overrides({"stop_at_step": job["stop_at_step"]})
    run_uri, end = train.resolve(train.checkpoints_uri), train.stop_at_step or train.num_steps
    if job["from_uri"] and not storage.exists(f"{run_uri}/{training.RECORD}"):
        storage.delete(run_uri)  # a copy that was cut off
        copy_run(f"{job['from_uri']}/checkpoints", run_uri)
    working = _Training(train)
    while working.thread.is_alive():
        working.thread.join(LOOK_SECONDS)
        for step, measured in new_scores(run_uri, config.metric, trial.last_step or job["from_step"]):
            if step < end:  # the last one, when the training has ended
                tune.report(trial.report(step, measured))
            if trial.was_ended():
                signals.ask_to_stop(run_uri)
                working.thread.join()
                return
    if working.error:
        trial.fail(_said(working.error))
        raise working.error
    scores = checkpoint.read_scores(run_uri)
    measured = scores[end][config.metric]
    exported = scores.get(working.exported_step, {})
    tune.report(trial.finish(end, measured, exported.get(config.metric, measured)))


class _Training:
    """A training run in a thread."""

    def __init__(self, config: TrainConfig) -> None:
        self.exported_step = -1  # none: it stopped on the way
        self.error: BaseException | None = None
        self._config = config
        self.thread = threading.Thread(target=self._run, name="training", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.exported_step = int(str(training.run(self._config).figures["exported_step"]))
        except SystemExit:  # it left after a checkpoint, as it was told to
            return
        except Exception as error:  # the trial raises it when the thread has ended
            self.error = error


class _Proposals(Searcher):  # type: ignore[misc]
    """The job of each trial by its number: known before, or with values that Optuna proposes when it is its turn."""

    def __init__(self, config: TuneConfig, jobs: dict[int, dict[str, Any]]) -> None:
        super().__init__(metric="score", mode="min")
        self.total = config.total_trials
        self._config = config
        self._jobs = jobs
        self._numbers: dict[str, int] = {}  # by Tune's name of the trial
        self._optuna: Any = _optuna(config) if config.search == "optuna" else None

    def suggest(self, trial_id: str) -> Any:
        """The job of the next trial."""
        number = len(self._numbers)
        if number == self.total:
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        if self._knows(trial_id):
            values = self._optuna.suggest(trial_id)
            self._jobs[number] = _job(self._config, self._config.trial_uri(number), number, values)
        job = self._jobs[number]
        Trial.begin(job["uri"], number, job["values"])
        return job

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna what was measured."""
        if self._knows(trial_id):
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how it ended; of a trial that was ended early it takes the last figure for what it is."""
        if self._knows(trial_id):
            is_finished = bool(result and result.get("finished"))
            self._optuna.on_trial_complete(trial_id, result if is_finished else None, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders hold it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def _knows(self, trial_id: str) -> bool:
        """Whether Optuna takes part in the trial: not in trial 0, which is nobody's proposal."""
        return self._optuna is not None and self._numbers[trial_id] > 0


def _optuna(config: TuneConfig) -> Any:
    """Ray Tune's Optuna searcher, which proposes again what was proposed before the sweep was killed."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    from app.tuning.sampler import NumberedSampler, to_optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    proposed = []
    for number in range(1, config.total_trials):
        trial = Trial.open(config.trial_uri(number), number)
        if not trial:
            break
        proposed.append(trial.values)
    return OptunaSearch(
        to_optuna(config.space),
        metric="score",
        mode="min",
        points_to_evaluate=proposed,
        sampler=NumberedSampler(config.seed, config.num_trials),
    )


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that leaves a mark where Tune's own would kill the trial's process, its workers' resources still taken."""

    def __init__(self, config: TuneConfig) -> None:
        super().__init__(
            time_attr="step",
            metric="score",
            mode="min",
            max_t=config.last_step,
            grace_period=min(config.asha.grace_steps, config.last_step),
            reduction_factor=config.asha.reduction_factor,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Mark the trial when it is to end."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and not result.get("finished"):
            _open(trial).end_early()
        return str(TrialScheduler.CONTINUE)


def _open(trial: Any) -> Trial:
    """Our trial of Tune's."""
    return Trial.begin(trial.config["uri"], trial.config["number"], trial.config["values"])


class _Watch(tune.Callback):  # type: ignore[misc]
    """Says how trials end, and notes it when the process of one was lost."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}  # failures of a trial when its attempt began

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An attempt begins."""
        begun = _open(trial)
        self._before[begun.uri] = len(begun.failures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It finished or was ended early."""
        ended = _open(trial)
        logger.info("trial %d %s: %s %s", ended.number, ended.outcome, ended.score, ended.values)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed and is tried again."""
        self._note(trial, "tried again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed for the last time."""
        self._note(trial, "given up")

    def _note(self, trial: Any, what: str) -> None:
        failed = _open(trial)
        if len(failed.failures) == self._before.get(failed.uri, len(failed.failures)):  # it could not say it itself
            failed.fail("the process of the trial was lost")
        logger.warning("trial %d failed, %s: %s", failed.number, what, failed.failures[-1])


def _said(error: BaseException) -> str:
    """The first line of what the user can mend, else of the error."""
    cause = logs.user_error(error) or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
