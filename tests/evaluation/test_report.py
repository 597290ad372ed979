import pytest

from app.evaluation.metrics import Figure
from app.evaluation.report import Benchmark, Content, loss_curve, moving_average, render


def content(**changes: object) -> Content:
    log = [{"step": step, "loss": 8.0 - step} for step in range(3)]
    log[-1]["held_out_bits_per_byte"] = 2.5
    return Content(
        figures={"bits_per_byte": Figure(2.3456, 2.25, 2.4444, 1234, "none (UTF-8 bytes)"), "documents": 1234},
        sources={"model": "/run/model"},
        decontamination={"held-out documents": "never trained on", "cmmlu": "67 of 67 files were NOT looked for"},
        benchmarks=[Benchmark("cmmlu", 5, {"农学": (0.25, 100)}, ["<harness>"])],
        log=log,
        samples=[("却说", "<b>曹操", "孔明")],
    )._replace(**changes)


def test_the_report_shows_figures_with_intervals_curve_and_samples_and_loads_nothing() -> None:
    page = render(content())
    for shown in (
        "2.3456",
        "2.25 – 2.444",
        "n 1,234",
        "tokenisation: none (UTF-8 bytes)",
        "<svg",
        "&lt;b&gt;曹操",
        "/run/model",
    ):
        assert shown in page
    for shown in ("农学", "0.250", "cmmlu, 5-shot", "&lt;harness&gt;", "class=warning>67 of 67"):
        assert shown in page
    assert "<script" not in page
    assert 'src="http' not in page


def test_a_report_may_have_neither_curve_nor_samples_nor_benchmarks() -> None:
    page = render(content(log=[], samples=[], benchmarks=[]))
    assert "<svg" not in page
    assert "Continuations" not in page


def test_a_curve_without_evaluation_is_drawn() -> None:
    assert loss_curve([{"step": 0, "loss": 1.0}]).startswith("<svg")


def test_the_moving_average_starts_at_the_first_value_and_forgets() -> None:
    assert moving_average([4.0, 4.0, 4.0]) == pytest.approx([4, 4, 4])
    assert moving_average([0.0, 1.0], memory=0.5) == pytest.approx([0, 2 / 3])
