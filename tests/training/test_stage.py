from pathlib import Path

import pytest

from app.artifacts import Input, Manifest
from app.training.checkpoint import MANIFEST_NAME, CheckpointManifest
from app.training.config import TrainConfig
from app.training.stage import RAY_RECORD, RECORD, open_run, refuse_other_order, summarize


def draft(digest: str = "a", **settings: object) -> Manifest:
    config = TrainConfig.model_validate(settings)
    return Manifest.draft("model", "/model", config, {"tokens": Input(uri="/tokens", digest=digest)})


def test_a_run_is_resumed_only_with_the_same_settings_and_data(tmp_path: Path) -> None:
    run = str(tmp_path)
    name = open_run(run, draft(), overwrite=False)
    assert open_run(run, draft(storage_uri="/elsewhere", max_failures=9, num_workers=1), overwrite=False) == name
    for other, said in (
        (draft("b"), "holds a run of other tokens: a, now b"),
        (draft(seed=1), "holds a run with seed: 0, now 1"),
        (draft(optimizer={"learning_rate": 1e-4}), "holds a run with optimizer.learning_rate: 0.001, now 0.0001"),
    ):
        with pytest.raises(ValueError, match=said):
            open_run(run, other, overwrite=False)
    assert open_run(run, draft(sequence_parallel=2), overwrite=False) == name
    with pytest.raises(ValueError, match="holds a run with tensor_parallel: 1, now 2"):
        open_run(run, draft(tensor_parallel=2), overwrite=False)
    (tmp_path / "checkpoints").mkdir()
    assert open_run(run, draft(seed=1), overwrite=True) != name
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_a_run_whose_data_had_another_order_is_refused(tmp_path: Path) -> None:
    refuse_other_order(str(tmp_path), "b" * 64)
    for step, fingerprint in ((10, "b" * 64), (20, "a" * 64)):
        one = CheckpointManifest(
            step=step, attempt=1, world_size=1, zero_stage=3, fingerprint=fingerprint, tokens=0, versions={}, config={}
        )
        folder = tmp_path / "checkpoints" / one.name
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).write_text(one.model_dump_json())
    refuse_other_order(str(tmp_path), "a" * 64)
    with pytest.raises(ValueError, match="in the order of aaaaaaaaaaaa…, which is now bbbbbbbbbbbb…"):
        refuse_other_order(str(tmp_path), "b" * 64)


def test_workers_that_share_matrices_stay_as_many(tmp_path: Path) -> None:
    open_run(str(tmp_path), draft(tensor_parallel=2), overwrite=False)
    with pytest.raises(ValueError, match="holds a run with num_workers: 2, now 4"):
        open_run(str(tmp_path), draft(tensor_parallel=2, num_workers=4), overwrite=False)


@pytest.mark.parametrize(("content", "kept"), [('{"checkpoint_resu', False), ("{}", True)])
def test_a_record_of_ray_cut_short_is_forgotten(tmp_path: Path, content: str, kept: bool) -> None:
    open_run(str(tmp_path), draft(), overwrite=False)
    (tmp_path / RAY_RECORD).write_text(content)
    open_run(str(tmp_path), draft(), overwrite=False)
    assert (tmp_path / RAY_RECORD).exists() is kept


def test_figures_of_a_log() -> None:
    log = [{"step": step, "loss": 8 - step / 10, "tokens_per_second": 100.0 + step} for step in range(20)]
    figures = summarize(log, TrainConfig(num_steps=20, global_batch_sequences=16), block_tokens=16)
    assert figures["train_loss"] == pytest.approx((6.2 + 6.1) / 2)
    assert figures["tokens"] == 20 * 16 * 16


def test_a_step_missing_or_twice_is_noticed() -> None:
    log = [{"step": step, "loss": 1.0, "tokens_per_second": 1.0} for step in (0, 1, 1)]
    with pytest.raises(AssertionError, match="a step is missing or there twice"):
        summarize(log, TrainConfig(num_steps=3), 16)
