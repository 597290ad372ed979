"""The training loop: what each Ray Train worker runs, top to bottom.

Every step is a function of (weights, seed, step): rows from the sampler, learning rate from the schedule, random state
reseeded. So a run that resumes from a checkpoint at the same world size repeats the undisturbed one bit for bit. What
to do next is decided from figures that all ranks have exchanged, so that all decide the same.
It knows nothing of Ray's retries; the stage configures them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from app.training import pipeline
from app.training.alarms import SpikeDetector
from app.training.engine import seed_everything, set_learning_rate
from app.training.gathering import FIELDS, exchange, rank_row, rank_values, step_values
from app.training.ledger import combine
from app.training.meters import StepMeter, gpu_figures, memory_bytes
from app.training.schedule import learning_rate
from app.training.worker import Worker

logger = logging.getLogger(__name__)

# Columns that this loop exchanges.
LOSS, GRAD_NORM, STOP, TALK, FAILED, COMPLETED, RIGHT, MARGIN = range(len(FIELDS), len(FIELDS) + 8)


def train_per_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Train to the last step, or until the run is stopped or cannot go on; collective: the same calls on every rank.

    `job` holds config (a dumped TrainConfig), run_uri, use_gpu, end_of_text_id, began and import_seconds. Returns step
    and, if it ended early, why: `error` for the user, `stopped` after a wish. Raised, they would be retried.
    """
    worker = Worker.set_up(job)
    config, engine, device = worker.config, worker.engine, worker.engine.device
    detector = SpikeDetector(config.correction)
    detector.reset(worker.recent_losses())
    feed = worker.open_feed(worker.step)
    reported = worker.step
    meter = StepMeter(worker.use_gpu, worker.clock)
    layout, averaged = worker.layout, worker.layout.averaged_ranks(config.zero_stage)
    last = min(config.num_steps, config.stop_at_step or config.num_steps)
    while worker.step < last:
        step = worker.step
        seed_everything(config.seed, step, worker.rank)
        rate = learning_rate(step, config.num_steps, config.optimizer)
        set_learning_rate(engine.optimizer, rate)
        with meter.part("data"):
            data = feed.next()
        weight = data.num_labels / (averaged * len(data.micro_batches))  # DeepSpeed takes means of sums
        loss_sum = torch.zeros((), device=device)
        if config.pipeline_stages > 1:
            with meter.part("forward_backward"):  # the optimizer's part is in it
                loss_sum += pipeline.train_step(engine, data.micro_batches, weight)
        else:
            for micro_batch in data.micro_batches:
                inputs = worker.to_device(micro_batch)
                with meter.part("forward_backward"):
                    loss = worker.loss(inputs, weight)
                    engine.backward(worker.balanced(loss, micro_batch["labels"]))
                with meter.part("optimizer"):
                    engine.step()
                loss_sum += loss.detach()
        share = float(loss_sum) / (averaged * len(data.micro_batches) * layout.same_loss)

        figures = meter.finish() | gpu_figures() | {"memory_bytes": memory_bytes(worker.use_gpu)}
        signs = [worker.signals.wants_stop, worker.signals.wants_to_talk(), worker.saver.error is not None]
        mine = [*rank_row(figures), share, float(engine.get_global_grad_norm()), *signs, worker.saver.completed]
        mine += worker.take_tally()
        rows, digests = exchange(mine, data.rows_digest if layout.is_first else 0, device)
        expert_values = worker.expert_values()
        loss_mean, grad_norm = float(rows[:, LOSS].sum()), float(rows[0, GRAD_NORM])
        if rows[:, FAILED].any():
            return worker.give_up(worker.saving_error())
        if reason := detector.is_bad(loss_mean, grad_norm):
            if error := worker.rewind(reason):
                return worker.give_up(error)
            detector.reset(worker.recent_losses())
            feed.close()
            feed = worker.open_feed(worker.step)
            meter.finish()  # the way back belongs to no step
            continue
        detector.accept(loss_mean)

        values: dict[str, Any] = {"loss": loss_mean, "grad_norm": grad_norm, "learning_rate": rate}
        values |= (
            expert_values
            | worker.pipeline_values()
            | step_values(rows, worker.work)
            | {"data_step": data.data_step, "rows": f"{combine(digests):016x}"}
        )
        if worker.learns_pairs:
            right, margin = (float(rows[:, column].sum()) / data.num_labels for column in (RIGHT, MARGIN))
            values |= {"preference_accuracy": right, "reward_margin": margin}
        worker.step = step + 1
        if worker.is_due(config.evaluation_interval_steps) and config.validation == "inline":
            with meter.part("evaluation"):
                scores = worker.score()
            worker.keep_scores(scores)
            values |= scores
        worker.telemetry.record(step, values, rank_values(rows))
        if worker.must_checkpoint():
            with meter.part("checkpoint"):
                worker.checkpoint()
        if rows[0, TALK]:
            if (completed := int(rows[0, COMPLETED])) > reported:
                reported = completed
                worker.report(completed, values)
            if worker.is_preempted():
                worker.checkpoint_now("a node is being taken away")
        if rows[0, STOP]:
            return worker.stop()

    feed.close()
    return worker.finish(reported) if last == config.num_steps else worker.stop()
