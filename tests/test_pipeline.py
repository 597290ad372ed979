"""One datum all the way: raw Chinese text to an answer of the served 4-bit model, on the shared cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint
from tests.warm_workers import family

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
SURNAMES, VERBS = "刘关张赵曹孙周诸葛司马", ["引兵南下", "问计于众", "大败而走", "置酒高会", "夜观天象"]
MODEL = {"hidden_size": 128, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2}
TRAIN = {
    "model": MODEL,
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
    "num_steps": 60,
    "global_batch_sequences": 8,
    "micro_batch_sequences": 4,
    "checkpoint_interval_steps": 5,
    "evaluation_interval_steps": 10,
}


def write_raw(folder: Path) -> int:
    """Some hundred small documents of four patterns, with duplicates and a line that is no JSON."""
    texts = [
        f"却说{a}将军{verb}，{b}军师曰：“第{number}回合，不可轻敌。”众皆称善，于是各引本部人马而去。"
        for number in range(12)
        for a, b in zip(SURNAMES, reversed(SURNAMES), strict=True)
        for verb in VERBS
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in [*texts, *texts[:100]]]
    folder.mkdir(parents=True)
    (folder / "novel.jsonl").write_text("\n".join([*lines, "not json"]), encoding="utf-8")
    (folder.parent / "bad.jsonl.gz").write_bytes(b"this is no gzip")
    return len(lines) + 1


def submit(cluster: LocalCluster, *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as a user types it."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    environment = os.environ | cluster.environment
    return subprocess.run([*ray, "python", *command], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def run(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The whole pipeline submitted once."""
    root = tmp_path_factory.mktemp("run")
    num_raw = write_raw(root / "raw")
    settings = {
        "prepare_corpus": {
            "sources": [{"name": "novel", "uri": "raw/*.jsonl"}],
            "dedup": {"near": False},  # the documents differ by little
            "held_out_fraction": 0.1,
        },
        "train_tokenizer": {"vocab_size": 512},
        "pack_tokens": {"block_tokens": 64},
        "train_model": TRAIN,
        "evaluate_model": {"num_continuations": 4, "prompt_tokens": 4, "continuation_tokens": 4},
        "quantize_model": {
            "num_calibration_samples": 8,
            "max_loss_percent": 5,
            "layer_group_sizes": {"re:.*self_attn.*_proj": 64},
        },
        "evaluate_quantized": {"num_continuations": 0},
        "deploy_model": {"port": cluster.endpoint_port},
        "check_parity": {"num_prompts": 4, "prompt_tokens": 12, "answer_tokens": 8},
    }
    config = root / "pipeline.yaml"
    config.write_text(yaml.safe_dump(settings, allow_unicode=True))
    command = ("jobs/run_pipeline.py", "--config", str(config), "--storage_uri", str(root))
    result = submit(cluster, *command)
    yield {"root": root, "num_raw": num_raw, "command": command, "result": result}
    from ray import serve

    serve.shutdown()


def test_every_stage_is_done_and_summed_up(run: dict[str, Any]) -> None:
    assert run["result"].returncode == 0, run["result"].stdout[-3000:]
    summary = (run["root"] / "summary.txt").read_text()
    assert summary in run["result"].stdout
    for stage in (
        "prepare_corpus",
        "train_tokenizer",
        "pack_tokens",
        "train_model",
        "evaluate_model",
        "quantize_model",
        "evaluate_quantized",
    ):
        assert stage in summary


def test_one_page_reports_the_run_and_the_model_has_a_card(run: dict[str, Any]) -> None:
    page = (run["root"] / "report.html").read_text(encoding="utf-8")
    assert page.count("<mark class=passed>passed</mark>") == 2  # quantization, parity
    for stage in ("prepare_corpus", "train_model", "evaluate_model", "quantize_model", "check_parity"):
        assert f"<section id={stage}>" in page
    titles = ["What was rejected, and why", "Time of a step", "Was it trained on?"]  # of the stages' own pages
    for title in [*titles, "Before and after quantization"]:
        assert f"<h2>{title}</h2>" in page
    assert not re.findall(r"<script|@import|(?:src|href)=[\"']?[^\"'#]", page)  # all in one file
    card = (run["root"] / "quantized" / "README.md").read_text(encoding="utf-8")
    for title in ("Training data", "Quantization", "Evaluation", "Parity with the endpoint", "Lineage"):
        assert f"\n## {title}\n" in card


def test_documents_and_tokens_are_conserved(run: dict[str, Any]) -> None:
    corpus = read_manifest(f"{run['root']}/corpus", "corpus").figures
    assert corpus["raw"] == run["num_raw"] == corpus["clean"] + corpus["rejected"]
    assert corpus["by_rule"] == {"duplicate": 100, "invalid_json": 1}
    tokens = read_manifest(f"{run['root']}/tokens", "tokens").figures
    for split in ("train", "held_out"):
        assert tokens[split]["documents"] == corpus[split]["documents"]
        assert tokens[split]["tokens"] == 64 * tokens[split]["blocks"] + tokens[split]["tail_tokens"]


def test_the_model_has_learned(run: dict[str, Any]) -> None:
    log = [json.loads(line) for line in (run["root"] / "model" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(60))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    report = read_manifest(f"{run['root']}/report", "report").figures
    assert report["bits_per_byte"] < 0.6 * report["unigram_token_bits_per_byte"]
    assert report["unigram_token_bits_per_byte"] < report["unigram_byte_bits_per_byte"]
    model = read_manifest(f"{run['root']}/model", "model").figures
    # Documents one by one against blocks that run on from one document to the next: close, not equal.
    assert report["bits_per_byte"] == pytest.approx(model["held_out_bits_per_byte"], abs=0.1)


def test_the_quantized_model_is_small_and_close(run: dict[str, Any]) -> None:
    figures = read_manifest(f"{run['root']}/quantized", "model").figures
    assert figures["linear_percent"] <= 14
    assert abs(figures["loss_percent"]) < 5
    report = read_manifest(f"{run['root']}/report", "report").figures
    assert figures["bits_per_byte_before"] == pytest.approx(report["bits_per_byte"], rel=1e-3)
    assert 50 < figures["same_next_token_percent"] <= 100
    again = read_manifest(f"{run['root']}/quantized-report", "report").figures
    assert figures["bits_per_byte_after"] == pytest.approx(again["bits_per_byte"], rel=1e-3)


def test_the_endpoint_answers_from_the_4_bit_weights(run: dict[str, Any], cluster: LocalCluster) -> None:
    settings = cluster.environment
    client = openai.OpenAI(base_url=settings["OPENAI_BASE_URL"], api_key=settings["OPENAI_API_KEY"])
    assert [model.id for model in client.models.list()] == ["zero-to-one"]
    question: Any = {
        "model": "zero-to-one",
        "messages": [{"role": "user", "content": "却说刘将军"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**question).choices[0].message.content
    stream = client.chat.completions.create(**question, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert whole
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    completion = client.completions.create(model="zero-to-one", prompt="却说刘将军", max_tokens=8, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 8
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=settings["OPENAI_BASE_URL"], api_key="wrong").models.list()
    logs = (cluster.temp_dir / "session_latest" / "logs").glob("worker-*.err")
    outputs = (cluster.temp_dir / "session_latest" / "logs").glob("worker-*.out")
    assert any("int4 kernel at work: 8 layers" in file.read_text(errors="replace") for file in (*logs, *outputs))


def test_the_endpoint_says_what_its_model_says(run: dict[str, Any]) -> None:
    figures = read_manifest(f"{run['root']}/parity", "report").figures
    served = figures["served"]
    assert isinstance(served, dict)
    assert (figures["gate"], figures["prompts"], served["tokens"]) == ("passed", 4, 32)
    assert figures["equal_renderings"] == figures["renderings"] == 4
    assert 0 < float(served["max_logprob_gap"]) <= 0.1


def test_a_rerun_redoes_nothing(run: dict[str, Any], cluster: LocalCluster) -> None:
    before = {path: path.stat().st_mtime_ns for path in run["root"].rglob("manifest.json")}
    assert len(before) >= 6
    result = submit(cluster, *run["command"])
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("skipped\n") >= 6
    assert {path: path.stat().st_mtime_ns for path in run["root"].rglob("manifest.json")} == before


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("prepare_corpus", ["--ruless.min_characters", "3"], "ruless: unknown key; did you mean rules?"),
        ("train_tokenizer", ["--corpus_uri", "nowhere"], "nowhere: no complete corpus artifact here"),
        ("train_model", ["--tokens_uri", "corpus"], "corpus: is a corpus artifact, expected tokens"),
        ("train_model", ["--num_steps", "61"], "already made, with other"),
        ("quantize_model", ["--model_uri", "tokens"], "tokens: is a tokens artifact, expected model"),
        ("prepare_corpus", ["--sources", "[{name: a, uri: bad.jsonl.gz}]", "--output_uri", "bad"], "repair the file"),
        ("prepare_corpus", ["--sources", "[{name: a, uri: no.jsonl}]", "--output_uri", "bad"], "no file at"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: dict[str, Any], job: str, arguments: list[str], message: str
) -> None:
    command = [sys.executable, f"jobs/{job}.py", "--storage_uri", str(run["root"]), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def _train(cluster: LocalCluster, root: Path, source: Path) -> subprocess.Popen[str]:
    """A training job of its own on the pipeline's tokens."""
    config = root / "train.yaml"
    root.mkdir()
    inputs = {"tokens_uri": f"{source}/tokens", "tokenizer_uri": f"{source}/tokenizer"}
    config.write_text(yaml.safe_dump({**TRAIN, **inputs, "wandb_mode": "disabled"}))
    command = [sys.executable, "jobs/train_model.py", "--config", str(config), "--storage_uri", str(root)]
    environment = os.environ | cluster.environment
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def _workers(cluster: LocalCluster) -> list[psutil.Process]:
    return [process for process in family(cluster) if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.long
def test_a_killed_worker_changes_nothing(run: dict[str, Any], cluster: LocalCluster) -> None:
    """SIGKILL after the first checkpoint: losses and weights equal those of the undisturbed run, bit for bit."""
    root = run["root"].parent / f"{run['root'].name}-killed"
    job = _train(cluster, root, run["root"])
    deadline = time.monotonic() + 240
    while not checkpoint.find_complete(f"{root}/checkpoints"):
        assert job.poll() is None, job.stdout and job.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victims = _workers(cluster)
    assert len(victims) == 2
    os.kill(victims[-1].pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output[-3000:]
    for field in ("loss", "learning_rate", "grad_norm"):
        undisturbed, disturbed = (
            [json.loads(line)[field] for line in (path / "model" / "training_log.jsonl").read_text().splitlines()]
            for path in (run["root"], root)
        )
        assert undisturbed == disturbed
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (run["root"], root)]
    assert weights[0] == weights[1]
    assert read_manifest(f"{root}/model", "model").figures["restarts"] == 1
