"""The page of a run: what every stage made, the gates, the lineage, and a run that failed."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from app.artifacts import Input, Manifest, publish
from app.config import RunConfig
from app.page import body_of, page
from app.pipeline.graph import BOX_HEIGHT, GAP, boxes_of, draw, generations
from app.pipeline.report import Made, Row, render

SVG = "{http://www.w3.org/2000/svg}"


def made(root: Path, kind: Any, name: str, figures: dict[str, Any], **inputs: Manifest | Input) -> Manifest:
    (root / name).mkdir()
    given = {key: one.as_input() if isinstance(one, Manifest) else one for key, one in inputs.items()}
    return publish(Manifest.draft(kind, str(root / name), RunConfig(), given), figures)


@pytest.fixture(name="run")
def run_fixture(tmp_path: Path) -> dict[str, Manifest]:
    raw = {f"raw{number}": Input(uri=f"/raw/{number}", digest=str(number)) for number in range(2)}
    corpus = made(tmp_path, "corpus", "corpus", {"clean": 7}, **raw)
    tokenizer = made(tmp_path, "tokenizer", "tokenizer", {}, corpus=corpus)
    model = made(tmp_path, "model", "model", {}, corpus=corpus, tokenizer=tokenizer)
    figures = {"gate": "failed: <too much>", "tried": {"group_32": 3.5}}
    quantized = made(tmp_path, "model", "quantized", figures, model=model, corpus=corpus)
    return {"prepare_corpus": corpus, "train_tokenizer": tokenizer, "train_model": model, "quantize_model": quantized}


def test_generations_go_from_the_raw_files_down(run: dict[str, Manifest]) -> None:
    boxes = boxes_of(run.values())
    titles = [[boxes[key].title for key in row] for row in generations(boxes)]
    assert titles == [["2 raw files"], ["corpus"], ["tokenizer"], ["model"], ["quantized"]]


def test_the_picture_has_a_box_for_each_artifact_and_an_arrow_for_each_input(run: dict[str, Manifest]) -> None:
    boxes = boxes_of(run.values())
    picture = ET.fromstring(draw(boxes).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    rectangles = picture.findall(f"{SVG}rect")
    arrows = picture.findall(f"{SVG}g/{SVG}path")
    assert len(rectangles) == len(boxes) == 5
    assert len(arrows) == sum(len(box.sources) for box in boxes.values()) == 6
    tops = sorted(int(one.get("y", "")) for one in rectangles)
    assert tops == [row * (BOX_HEIGHT + GAP) for row in range(5)]  # no box above another


def test_without_artifacts_there_is_no_picture() -> None:
    assert draw({}) == ""


def test_the_page_has_the_gates_the_figures_and_the_pages_of_the_stages(run: dict[str, Manifest]) -> None:
    own = page("Corpus", ["<h1>Corpus</h1><p>the funnel</p>"])
    stages = {name: Made(manifest) for name, manifest in run.items()}
    stages["prepare_corpus"] = Made(run["prepare_corpus"], body_of(own))
    rows = [
        Row("prepare_corpus", 1.26, False, "9 → 7 <documents>", "2 rejected"),
        Row("train_tokenizer", 0, True, "", ""),
    ]
    text = render(rows, stages, "")
    assert "<section id=prepare_corpus><h1>Corpus</h1><p>the funnel</p></section>" in text
    assert "<mark class=failed>failed: &lt;too much&gt;</mark>" in text
    assert "<td>tried.group_32</td><td class=number>3.5</td>" in text
    assert "<td class=number>1.3</td><td>9 → 7 &lt;documents&gt;</td>" in text
    assert "<td>skipped</td>" in text
    assert "did not end" not in text
    assert "<script" not in text
    assert "http" not in text


def test_both_evaluations_are_compared_where_they_measured_the_same(tmp_path: Path) -> None:
    both = {}
    for name, bits in (("evaluate_model", 2.0), ("evaluate_quantized", 2.5)):
        figures = {"bits_per_byte": bits, "bits_per_byte_interval": {"low": 1, "high": 3}, "documents": 7}
        both[name] = Made(made(tmp_path, "report", name, figures))
    both["evaluate_model"].manifest.figures["bleu"] = 1.0
    text = render([], both, "")
    table = text[text.index("<h2>Before and after quantization</h2>") : text.index("<section")]
    assert "<td>bits_per_byte</td><td class=number>2</td><td class=number>2.5</td><td>+25.00 %</td>" in table
    assert table.count("<tr>") == 2


def test_a_run_that_failed_says_where(run: dict[str, Manifest]) -> None:
    text = render([], {"prepare_corpus": Made(run["prepare_corpus"])}, "train_tokenizer: no <text>")
    assert "<p class=warning>The run did not end: train_tokenizer: no &lt;text&gt;</p>" in text
    assert "<td>clean</td><td class=number>7</td>" in text
