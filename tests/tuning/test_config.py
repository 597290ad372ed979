from typing import Any

import pytest

from app.config import validate
from app.tuning.config import TuneConfig

SPACE = {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}}

DEEPSEEK = {
    "architecture": "deepseek_v3",
    "num_experts": 4,
    "experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "latent": {"key_value_rank": 32, "rope_head_size": 16, "plain_head_size": 16, "value_head_size": 32},
}


def config(**changes: Any) -> TuneConfig:
    return validate(TuneConfig, {"storage_uri": "/runs", "space": SPACE, **changes})


def test_trial_0_is_the_config_as_it_stands() -> None:
    planned = config(num_trials=3).planned()
    assert [number for number, _ in planned] == [0, 1, 2]
    assert planned[0][1] == {}
    assert config().trial_config("/runs/trials/0000", {}).optimizer == config().train.optimizer


def test_a_trial_trains_in_its_own_folder() -> None:
    train = config(train={"num_steps": 7}).trial_config("/runs/trials/0003", {"optimizer.learning_rate": 0.25})
    assert (train.num_steps, train.optimizer.learning_rate) == (7, 0.25)
    assert train.resolve(train.checkpoints_uri) == "/runs/trials/0003/checkpoints"
    assert train.resolve(train.output_uri) == "/runs/trials/0003/model"
    assert train.resolve(train.tokens_uri) == "/runs/tokens"


def test_more_trials_leave_the_first_ones_as_they_are() -> None:
    assert config(num_trials=20).planned()[:5] == config(num_trials=5).planned()


def test_a_grid_has_as_many_trials_as_combinations_and_the_start() -> None:
    space = {"optimizer.beta2": {"choice": [0.95, 0.99]}, "global_batch_sequences": {"choice": [8, 16, 32]}}
    grid = config(space=space, search="grid")
    assert grid.total_trials == 7
    assert grid.planned()[6] == (6, {"optimizer.beta2": 0.99, "global_batch_sequences": 32})


def test_asha_knows_the_longest_trial() -> None:
    assert config(train={"num_steps": 100}).last_step == 100
    assert config(space={"num_steps": {"integer": [50, 700]}}).last_step == 700


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {}}, "name at least one key"),
        ({"space": {"optimizer.lr": {"choice": [1]}}}, r"space\.optimizer\.lr: unknown key"),
        ({"space": {"seed": {"choise": [1]}}}, r"space\.seed\.choise: unknown key; did you mean space\.seed\.choice\?"),
        ({"space": {"model.hidden_size": {"choice": [250, 251]}}}, "trial 1 .* num_heads must divide hidden_size"),
        ({"train": {"validation": "async"}}, r"train\.validation must be inline"),
        ({"metric": "replay_bits_per_byte"}, r"needs train\.replay\.tokens_uri"),
        ({"scheduler": "asha", "asha": {"grace_steps": 10}}, r"asha\.grace_steps \(10\) must not be below .* \(50\)"),
        ({"scheduler": "pbt", "search": "optuna"}, "scheduler pbt needs search random"),
        ({"scheduler": "pbt", "space": {"seed": {"choice": [1]}}}, r"space\.seed: scheduler pbt may only change"),
        ({"scheduler": "pbt", "pbt": {"interval_steps": 70}}, r"pbt\.interval_steps \(70\) must be a multiple"),
        ({"times_narrower": 3}, r"times_narrower \(3\) must divide train\.model\.hidden_size"),
        ({"times_narrower": 2, "space": {"model.num_heads": {"choice": [8]}}}, r"space\.model\.num_heads: .* sets it"),
        ({"times_narrower": 2, "train": {"model": DEEPSEEK}}, r"times_narrower: not with .* deepseek_v3"),
        ({"times_narrower": 2, "train": {"init_from_uri": "/m"}}, r"times_narrower: trials train fresh models"),
        ({"train": {"num_stps": 4}}, r"train\.num_stps: unknown key; did you mean train\.num_steps\?"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_it_starts(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_a_narrow_model_stands_for_the_wide_one() -> None:
    given = config(times_narrower=4, train={"overwrite": True})
    values = {"optimizer.learning_rate": 0.25}
    trial, chosen = given.trial_config("/runs/trials/0001", values), given.chosen(values)
    wide, narrow = given.train.model, trial.model
    assert (narrow.hidden_size, narrow.num_heads, narrow.num_key_value_heads) == (64, 2, 1)
    assert narrow.head_width == wide.head_width
    assert trial.optimizer.found_at_hidden_size == 0
    assert (chosen.model, chosen.optimizer.found_at_hidden_size) == (wide, 64)
    assert chosen.optimizer.learning_rate == trial.optimizer.learning_rate == 0.25
    assert (chosen.storage_uri, chosen.overwrite) == ("/runs", True)
    assert any("a trial's model is 64 wide; best.yaml is for 256" in line for line in given.plan())


def test_a_population_begins_with_the_config_and_ends_with_its_steps() -> None:
    population = config(scheduler="pbt", num_trials=2, train={"num_steps": 250})
    assert population.planned()[0] == (0, {"optimizer.learning_rate": 1e-3})
    assert population.generation_ends == [100, 200, 250]
    assert "3 generations, to steps 100, 200, 250" in "\n".join(population.plan())


def test_the_plan_tells_workers_and_trials() -> None:
    plan = "\n".join(config(num_trials=3, max_concurrent_trials=2, train={"num_workers": 4}).plan())
    assert "3 trials (random) over optimizer.learning_rate" in plan
    assert "2 at once on 4 workers each: 8 GPUs" in plan
    assert "trial 2: {'optimizer.learning_rate': 0.00" in plan
