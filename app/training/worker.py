"""A worker's parts and what it does with them beside stepping: start, checkpoint, rewind, report, stop, end.

All ranks make the same calls; where one rank is enough it is rank 0, which writes the journal, the events and the
telemetry. The order of a step is in loop.py alone.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Self

import ray.train
import torch

from app import logs
from app.training import adapter, checkpoint, export, held_out, nvme, pipeline, preference, restart, saver, sharing
from app.training.batches import PAIRS, Blocks, open_plan, open_train_blocks, read_tokens
from app.training.checkpoint import CheckpointManifest
from app.training.config import TrainConfig
from app.training.engine import build, num_matrix_parameters, whole_model
from app.training.experts import Experts
from app.training.families import attention_width, local_layers
from app.training.feed import Feed, Share
from app.training.gathering import Workload
from app.training.held_out import HeldOut, open_all
from app.training.journal import Journal, add_event
from app.training.layout import Layout
from app.training.ledger import Rewind, data_step_of, skipped_windows
from app.training.meters import CommunicationClock, measure_communication, peak_flops
from app.training.sampler import Plan
from app.training.signals import Signals
from app.training.sizes import flops_per_token, seen_tokens
from app.training.stages import bubble_share
from app.training.telemetry import Telemetry

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "deepspeed", "transformers", "ray")


@dataclass
class Worker:
    """One rank of a run; `step` counts the steps that are done."""

    config: TrainConfig
    run_uri: str
    use_gpu: bool
    rank: int
    world_size: int
    engine: Any
    plan: Plan
    sources: Sequence[Blocks]
    held_out: dict[str, HeldOut]
    start: restart.Start
    work: Workload
    clock: CommunicationClock | None
    step: int = 0
    rewinds: list[Rewind] = field(default_factory=list)
    learns_pairs: bool = False
    tally: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    _preempted: bool = False

    @classmethod
    def set_up(cls, job: dict[str, Any]) -> Self:
        """Join the group, build the engine, restore the newest whole checkpoint; collective."""
        import deepspeed

        _quiet()
        config, run_uri, use_gpu = TrainConfig.model_validate(job["config"]), job["run_uri"], job["use_gpu"]
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        deepspeed.ops.__compatible_ops__ = {}  # else g++ builds a shared-memory all-reduce, which only inference calls
        deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")
        sources = open_train_blocks(config)
        start = restart.choose(run_uri, rank, world_size)
        shape = job["vocabulary"] | {"block_tokens": sources[0].block_tokens}
        if config.nvme_dir:
            nvme.prepare()
        own = {"nvme_dir": f"{config.nvme_dir}/{job['run_name']}"} if config.nvme_dir else {}
        engine = build(config.with_overrides(own), shape, world_size, use_gpu)
        built = time.time()
        if start.manifest:
            logger.info("resuming after step %d", start.step)
            saver.load(engine, run_uri, start.manifest)
        worker = cls(
            config, run_uri, use_gpu, rank, world_size, engine, open_plan(config), sources, open_all(config), start,
            _workload(config, whole_model(engine), sources[0].block_tokens, use_gpu),
            None if use_gpu else measure_communication(), start.step, list(start.rewinds),
        )  # fmt: skip
        worker.learns_pairs = read_tokens(config)[0].figures.get("kind") == PAIRS
        worker._begin(job, built)
        return worker

    def _begin(self, job: dict[str, Any], built: float) -> None:
        self.saver = saver.Saver(self.engine, self.run_uri, self._retire)
        self.signals = Signals(self.run_uri, self.rank)
        self.journal = Journal(self.run_uri, self.step) if self.rank == 0 else None
        if self.rank == 0:
            model = whole_model(self.engine)
            if not self.start.manifest:
                export.save_architecture(model.config, type(model).__name__, self.run_uri)
            trained, total = adapter.count(model)
            if trained < total:
                logger.info(
                    "training %s of %s parameters, %.2f %%", f"{trained:,}", f"{total:,}", 100 * trained / total
                )
            add_event(
                self.run_uri, "started", step=self.step, world_size=self.world_size,
                import_seconds=job["import_seconds"], setup_seconds=built - job["began"] - job["import_seconds"],
                load_seconds=time.time() - built, reached=self.start.reached, last_alive=self.start.last_alive,
                trainable_parameters=trained, all_parameters=total,
            )  # fmt: skip
        rate = 0.0 if self.config.adapter.rank else self.config.optimizer.router_bias_rate  # an adapter has no bias
        self.experts = Experts.of(self.engine.module, rate)
        self.telemetry = Telemetry(self.config, self.run_uri, job["run_name"], self.journal, self.step)
        torch.distributed.barrier()

    @property
    def ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return self.rank, self.world_size

    @property
    def layout(self) -> Layout:
        """Which rows and tokens are this rank's."""
        return Layout.of(self.config, *self.ranks)

    def open_feed(self, step: int) -> Feed:
        """The batches of this rank from a step on."""
        config = self.config
        accumulation_steps = config.accumulation_steps(self.world_size)
        share = Share(
            self.layout.data_rank, self.layout.data_size, config.micro_batch_sequences, accumulation_steps,
            config.document_masking, self.learns_pairs,
        )  # fmt: skip
        windows = skipped_windows(self.rewinds)
        return Feed(self.sources, self.plan, share, data_step_of(step, self.rewinds), windows)

    def to_device(self, micro_batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's inputs where it is, [B, T], of T this rank's; in one row of B·T if only so the attention sees the
        documents.
        """
        joined = self.config.document_masking and self.config.attention == "flash_attention_2"
        return {
            name: (tensor.view(1, -1) if joined else tensor).to(self.engine.device, non_blocking=True)
            for name, tensor in sharing.model_inputs(micro_batch, self.layout).items()
        }

    def loss(self, inputs: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        """Sum over the micro-batch's labels divided by the weight, or over its pairs."""
        if not self.learns_pairs:
            loss: torch.Tensor = self.engine(**inputs, num_items_in_batch=weight).loss
            return loss
        beta = self.config.preference.beta
        judged = preference.judge(self.engine, inputs, self.sources[0].block_tokens, beta)
        self.tally = self.tally + judged.tally.to(self.tally.device)
        return judged.loss_sum / weight

    def score(self) -> dict[str, float]:
        """Held-out figures of the weights as they are; collective."""
        score = pipeline.score if self.config.pipeline_stages > 1 else held_out.score
        return score(self.held_out, self.engine, self.config.micro_batch_sequences, self.layout)

    def take_tally(self) -> list[float]:
        """How many pairs of this rank were told right since the last call, and the sum of their margins."""
        right, margin, _ = self.tally.tolist()
        self.tally = torch.zeros_like(self.tally)
        return [right, margin]

    def balanced(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What to go backward from: the loss itself, with the balancing loss of a mixture of experts."""
        return self.experts.balanced(loss, labels) if self.experts else loss

    def expert_values(self) -> dict[str, float]:
        """The step's load of the experts, {} for a dense model; all shares are noted now and then; collective."""
        if not self.experts:
            return {}
        values, shares = self.experts.values()
        done = self.step + 1
        if self.rank == 0 and (done % self.config.evaluation_interval_steps == 0 or done == self.config.num_steps):
            add_event(self.run_uri, "experts", step=done, shares=shares.round(6).tolist())
        return values

    def pipeline_values(self) -> dict[str, float]:
        """The planned share of a step that a stage waits; {} without stages."""
        num_stages = self.config.pipeline_stages
        num_micro_batches = self.config.accumulation_steps(self.world_size)
        return {"bubble_share": bubble_share(num_stages, num_micro_batches)} if num_stages > 1 else {}

    def recent_losses(self) -> list[float]:
        """Losses of the steps before, as many as the spike detector looks at; collective."""
        window = self.config.correction.window_steps
        lines = self.journal.lines()[-window:] if self.journal else []
        return restart.broadcast([line["loss"] for line in lines])

    def is_due(self, interval_steps: int) -> bool:
        """Whether the interval ends at this step, or the run does."""
        return self.step % interval_steps == 0 or self.step == self.config.num_steps

    def must_checkpoint(self) -> bool:
        """Whether a checkpoint is due, for itself or to be scored while training goes on."""
        config = self.config
        is_scored = config.validation == "async" and self.is_due(config.evaluation_interval_steps)
        return self.is_due(config.checkpoint_interval_steps) or is_scored

    def checkpoint(self) -> None:
        """Begin to write one; it is done behind the next steps."""
        if self.journal:
            self.journal.flush()
        self.saver.begin(self._draft(self.step))

    def _draft(self, step: int) -> CheckpointManifest:
        config = self.config
        return CheckpointManifest(
            step=step,
            attempt=self.start.attempt,
            world_size=self.world_size,
            zero_stage=config.zero_stage,
            fingerprint=self.plan.fingerprint,
            tokens=step * config.global_batch_sequences * self.sources[0].block_tokens,
            versions={name: version(name) for name in LIBRARIES},
            config=config.model_dump(mode="json"),
        )

    def checkpoint_now(self, why: str) -> bool:
        """Write one, unless this step has it, and wait; whether it is complete."""
        if not self.must_checkpoint():
            logger.info("%s: making a checkpoint at step %d", why, self.step)
            self.checkpoint()
        return self.saver.settle()

    def keep_scores(self, scores: dict[str, float]) -> None:
        """Remember the held-out figures of this step: they choose the checkpoint that is exported."""
        if self.rank == 0 and scores:
            checkpoint.write_scores(self.run_uri, self.step, scores)

    def report(self, completed: int, values: dict[str, Any]) -> None:
        """Tell Ray Train of a complete checkpoint, so that a Ray task scores it if that is wished; collective."""
        metrics = {"step": completed, **{name: value for name, value in values.items() if isinstance(value, float)}}
        if self.config.validation == "inline" or completed % self.config.evaluation_interval_steps:
            ray.train.report(metrics)
            return
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(f"{checkpoint.folder(self.run_uri)}/{self._draft(completed).name}"),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": completed}),
        )

    def rewind(self, reason: str) -> str:
        """Go back to the newest whole checkpoint and skip the data since; what is wrong if that cannot be done."""
        if not self.saver.settle():
            return self.saving_error()
        at_step, limit = self.step, self.config.correction.max_rewinds
        what = f"step {at_step}: {reason}"
        advice = "lower optimizer.learning_rate or check the data"
        if self.rank == 0 and self.rewinds and limit > len(self.rewinds):
            restart.drop_suspect(self.run_uri, self.rewinds[-1].to_step)
        manifest = restart.choose_checkpoint(self.run_uri, *self.ranks)
        if manifest is None:
            return f"{what}; there is no checkpoint to go back to; {advice}"
        if len(self.rewinds) >= limit:
            kept = f"the checkpoint of step {manifest.step} is whole"
            return (
                f"{what}; rewound {len(self.rewinds)} times already (correction.max_rewinds {limit}); {advice}; {kept}"
            )
        self.rewinds.append(Rewind(manifest.step, at_step, reason))
        if self.journal:
            logger.warning("%s: back to step %d, its data is skipped", what, manifest.step)
            add_event(self.run_uri, "rewound", to_step=manifest.step, at_step=at_step, reason=reason)
            checkpoint.forget_scores(self.run_uri, manifest.step)
            self.journal.rewind(manifest.step)
        saver.load(self.engine, self.run_uri, manifest)
        self.step = manifest.step
        return ""

    def is_preempted(self) -> bool:
        """Whether a node of the run is about to be taken away, the first time that it is known; collective."""
        if self._preempted or ray.train.get_preemption_info() is None:
            return False
        self._preempted = True
        return True

    def saving_error(self) -> str:
        """What kept a rank from writing its part; collective. Raises what is not the user's to mend, to be retried."""
        self.saver.settle()
        texts: list[str | None] = [None] * self.world_size
        error = self.saver.error
        cause = logs.user_error(error)
        torch.distributed.all_gather_object(texts, str(cause) if cause else None)
        if error and not cause:
            raise error
        whole = checkpoint.find_complete(self.run_uri)
        kept = f"the checkpoint of step {whole[0].step} is whole" if whole else "there is none before it"
        found = next(filter(None, texts), None)
        if found is None:
            raise RuntimeError("another worker could not write its part of a checkpoint")
        return f"checkpoint at step {self.step}: {found}; {kept}"

    def give_up(self, error: str) -> dict[str, Any]:
        """End without being retried: the user has to mend something."""
        self._close()
        return {"step": self.step, "error": error}

    def stop(self) -> dict[str, Any]:
        """Leave after a checkpoint, as was wished."""
        if not self.checkpoint_now("asked to stop"):
            return self.give_up(self.saving_error())
        if self.rank == 0:
            add_event(self.run_uri, "stopped", step=self.step, cause="asked to stop")
        self._close()
        return {"step": self.step, "stopped": True}

    def finish(self, reported: int) -> dict[str, Any]:
        """After the last step: wait for its checkpoint, say that the run is done."""
        if not self.saver.settle():
            return self.give_up(self.saving_error())
        if reported < self.step:
            self.report(self.step, {})
        if self.rank == 0:
            add_event(self.run_uri, "finished", step=self.step)
        self._close()
        return {"step": self.step}

    def _close(self) -> None:
        self.signals.close()
        self.telemetry.finish()
        nvme.clear(self.engine)

    def _retire(self) -> None:
        """Keep the newest, the best, and those that are still to be scored."""
        scores, protected = checkpoint.read_scores(self.run_uri), set[int]()
        if self.config.export == "best":
            protected = {checkpoint.best_step(scores)}
        if self.config.validation == "async":
            newer = {one.step for one in checkpoint.find_complete(self.run_uri) if one.step > max(scores, default=0)}
            protected |= {step for step in newer if step % self.config.evaluation_interval_steps == 0}
        checkpoint.retire(self.run_uri, self.config.keep_checkpoints, protected)


def _workload(config: TrainConfig, model: Any, block_tokens: int, use_gpu: bool) -> Workload:
    shape = model.config
    num_layers = shape.num_hidden_layers
    seen = seen_tokens(block_tokens, num_layers, *local_layers(shape))
    per_token = flops_per_token(num_matrix_parameters(model), num_layers, attention_width(shape), seen)
    return Workload(config.global_batch_sequences * block_tokens, per_token, peak_flops(use_gpu))


def _quiet() -> None:
    logs.configure()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    by_file = [name for name in logging.root.manager.loggerDict if "/ray/train/" in name]  # Ray names some so
    for name in ("DeepSpeed", "ray.train", "transformers", *by_file):
        logging.getLogger(name).setLevel(logging.WARNING)
