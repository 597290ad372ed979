import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.alarms import Alarms, SpikeDetector, robust_score
from app.training.config import AlarmConfig, CorrectionConfig

CONFIG = AlarmConfig(window_steps=3)
losses = st.lists(st.floats(0.1, 20), max_size=60)


def test_an_alarm_fires_once_and_again_after_it_was_good() -> None:
    alarms = Alarms(CONFIG)
    shares = [0.2] * 5 + [0.01] * 3 + [0.2] * 4
    fired = [step for step, share in enumerate(shares) if alarms.look(step, {"communication_share": share})]
    assert fired == [2, 9]  # a full window is bad; two good values of three end it, two bad ones begin it


def test_one_bad_step_is_no_alarm() -> None:
    alarms = Alarms(CONFIG)
    assert not [step for step in range(9) if alarms.look(step, {"grad_norm": 1e6 if step == 5 else 1.0})]


def test_a_level_is_below_for_utilization_and_above_for_the_others() -> None:
    alarms = Alarms(CONFIG)
    values = {"gpu_utilization": 0.5, "communication_share": 0.01, "grad_norm": 500.0}
    fired = [alarm for step in range(3) for alarm in alarms.look(step, values)]
    assert [(alarm.step, alarm.name, alarm.value, alarm.level) for alarm in fired] == [
        (2, "gpu_utilization", 0.5, 0.9),
        (2, "grad_norm", 500.0, 100.0),
    ]
    assert str(fired[0]) == "gpu_utilization 0.5 is below 0.9"


def test_a_figure_that_is_not_measured_raises_nothing() -> None:
    alarms = Alarms(AlarmConfig(window_steps=1))
    assert alarms.look(0, {"loss": 3.0}) == []


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step(loss: float, grad_norm: float) -> None:
    assert "gradient norm" in (SpikeDetector(CorrectionConfig(spike_score=0)).is_bad(loss, grad_norm) or "")


def test_a_spike_needs_half_a_window_and_goes_up() -> None:
    detector = SpikeDetector(CorrectionConfig(window_steps=8, spike_score=8.0))
    for loss in (2.0, 2.1, 1.9):
        detector.accept(loss)
    assert detector.is_bad(9.0, 1.0) is None
    detector.accept(2.0)
    assert detector.is_bad(9.0, 1.0) == "loss 9 is 94.4 robust deviations above the median of 4 steps"
    assert detector.is_bad(2.3, 1.0) is None
    assert detector.is_bad(0.1, 1.0) is None


def test_no_score_no_spike() -> None:
    detector = SpikeDetector(CorrectionConfig(window_steps=8, spike_score=0))
    detector.reset([2.0] * 8)
    assert detector.is_bad(99.0, 1.0) is None


def test_the_deviation_of_a_flat_loss_is_a_hundredth_of_it() -> None:
    assert robust_score(2.1, [2.0] * 9) == pytest.approx(5.0)


@given(losses, st.lists(st.floats(0.1, 20), max_size=9), st.floats(0.1, 1000))
def test_a_resumed_run_decides_as_the_undisturbed_one(before: list[float], after: list[float], loss: float) -> None:
    undisturbed, resumed = (SpikeDetector(CorrectionConfig(window_steps=16)) for _ in range(2))
    for value in before:
        undisturbed.accept(value)
    resumed.accept(123.0)  # of steps that are taken back
    resumed.reset(before)
    for value in after:
        undisturbed.accept(value)
        resumed.accept(value)
    assert undisturbed.is_bad(loss, 1.0) == resumed.is_bad(loss, 1.0)
