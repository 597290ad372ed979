"""Evaluation stage: held-out bits per byte, continuations compared with what the documents say, choice benchmarks.

Documents and questions are read in Ray actors; the driver computes the measures and writes the report.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import ray

from app import cluster, storage
from app.artifacts import EVALUATION, Input, Manifest, clear, find_complete, publish, raw_inputs, read_manifest
from app.documents import sample_texts
from app.evaluation import decontamination, metrics, report, speed
from app.evaluation.config import ChoiceConfig, EvaluateConfig, SpeedConfig
from app.evaluation.generation import Workers
from app.evaluation.metrics import Figure
from app.models import encode, load_tokenizer

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 2  # more than most tokens hold: a document so long fills prompt and continuation
SAMPLES_SHOWN = 8
BASELINE_DOCUMENTS = 50_000  # training documents that the unigram models are fitted on

Figures = dict[str, Figure | float]


def run(config: EvaluateConfig) -> Manifest:
    """Make the report artifact. Raises ValueError when inputs are missing or nothing was held out."""
    uri = config.resolve(config.output_uri)
    model = read_manifest(config.resolve(config.model_uri), "model")
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    benchmarks = [_resolve(one, config) for one in config.choices]
    asked = {one.name: _asked(one) for one in benchmarks}
    inputs = {"model": model.as_input(), "corpus": corpus.as_input()}
    inputs |= {name: found for name, found in corpus.inputs.items() if name.startswith(EVALUATION)}
    inputs |= {f"choices {file}": found for files in asked.values() for file, found in files.items()}
    draft = Manifest.draft("report", uri, config, inputs)
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    scratch_uri = f"{uri}-shards"  # beside the report, which is cleared when a run that broke off goes on
    held_out = sample_texts(corpus.uri, "held_out", config.max_documents)
    with Workers(model.as_input(), scratch_uri, config.num_workers) as workers:
        figures = _likelihood(workers, corpus.uri, held_out)
        samples = _continue(workers, held_out, config)
        found = [_ask(workers, one, shots, figures) for one in benchmarks for shots in one.shots]
        figures |= _compare(workers, samples, config) if samples else {}
    figures |= _decode(model.uri, held_out, config) if config.speed.batch_sizes else {}
    states = {"held-out documents": decontamination.state_of_held_out(corpus)}
    states["evaluation items in the corpus"] = decontamination.state_of_corpus(corpus)
    states |= {name: decontamination.state_of(files, corpus) for name, files in asked.items()}
    sources = {"model": model.uri, "corpus": corpus.uri}
    shown = report.Content(figures, sources, states, found, _training_log(model.uri), samples[:SAMPLES_SHOWN])
    flat = _write(uri, shown)
    storage.delete(scratch_uri)
    return publish(draft, flat)


def _write(uri: str, content: report.Content) -> dict[str, Any]:
    """Both forms of the report; the figures as the manifest has them, each value under its own name."""
    flat: dict[str, Any] = {}
    for name, figure in content.figures.items():
        flat[name] = figure.value if isinstance(figure, Figure) else figure
        if isinstance(figure, Figure):
            flat[f"{name}_interval"] = {key: value for key, value in figure._asdict().items() if key != "value"}
    storage.write_atomic(f"{uri}/report.html", report.render(content).encode())
    as_json = {
        "figures": flat,
        "sources": content.sources,
        "decontamination": content.decontamination,
        "choices": [one._asdict() for one in content.benchmarks],
        "samples": content.samples,
    }
    storage.write_atomic(f"{uri}/report.json", json.dumps(as_json, ensure_ascii=False, indent=2).encode())
    return flat


def _likelihood(workers: Workers, corpus_uri: str, held_out: list[str]) -> Figures:
    from app.evaluation.modules import figure_of  # slow to import

    logger.info("scoring %d held-out documents", len(held_out))
    nats = workers.score(held_out)
    sizes = [len(text.encode()) for text in held_out]
    train = sample_texts(corpus_uri, "train", BASELINE_DOCUMENTS)
    of_bytes = metrics.unigram_bits(map(str.encode, train), map(str.encode, held_out), 256) / sum(sizes)
    with storage.local_copy(workers.model_uri) as folder:
        tokenizer = load_tokenizer(folder)
    train_ids, held_out_ids = (encode(tokenizer, texts) for texts in (train, held_out))
    of_tokens = metrics.unigram_bits(train_ids, held_out_ids, len(tokenizer)) / sum(sizes)
    columns = {"nats": nats, "num_bytes": sizes, "num_tokens": list(map(len, held_out_ids))}
    bits, perplexity = (_rounded(figure_of(measure, **columns)) for measure in metrics.likelihood_measures())
    return {
        "bits_per_byte": bits,
        "perplexity": perplexity,
        "unigram_token_bits_per_byte": round(of_tokens, 4),
        "unigram_byte_bits_per_byte": round(of_bytes, 4),
        "reduction_percent": round(100 * (1 - bits.value / of_bytes), 2),
        "documents": len(held_out),
    }


def _continue(workers: Workers, held_out: list[str], config: EvaluateConfig) -> list[tuple[str, str, str]]:
    if not config.num_continuations:
        return []
    needed = CHARACTERS_PER_TOKEN * (config.prompt_tokens + config.continuation_tokens)
    chosen = [text for text in held_out if len(text) >= needed][: config.num_continuations]
    if not chosen:
        logger.warning("no held-out document is long enough to be continued")
        return []
    logger.info("continuing %d documents", len(chosen))
    return workers.continue_texts(chosen, config)


def _compare(workers: Workers, samples: list[tuple[str, str, str]], config: EvaluateConfig) -> Figures:
    """Likeness and variety of the continuations."""
    from app.evaluation.modules import figure_of

    name = "Universal Sentence Encoder, before pooling"
    if config.bertscore_dir:
        name = f"{Path(config.bertscore_dir).name}, layer {config.bertscore_layer}"
    _, continuations, originals = (list(column) for column in zip(*samples, strict=True))
    measures = metrics.text_measures(originals, partial(workers.similarity, config), name)
    columns = {"predictions": continuations, "references": originals}
    found = {measure.name: _rounded(figure_of(measure, **columns)) for measure in measures}
    return {"continuations": len(samples), **found}


def _decode(model_uri: str, held_out: list[str], config: EvaluateConfig) -> Figures:
    """Tokens a second, when the readers have given back what they held: a process of its own has the engine."""
    from app.evaluation.modules import figure_of

    batches, num_gpus = config.speed.batch_sizes, config.speed.num_gpus if cluster.has_gpu() else 0
    logger.info("decoding %s sequences at once", ", ".join(map(str, batches)))
    task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_calls=1)(_decode_there)
    ran_on, runs = ray.get(task.remote(model_uri, held_out, config.speed))
    measures = [metrics.speed(batch, batch * config.speed.new_tokens, ran_on) for batch in batches]
    return {one.name: _rounded(figure_of(one, seconds=seconds)) for one, seconds in zip(measures, runs, strict=True)}


def _decode_there(model_uri: str, texts: list[str], config: SpeedConfig) -> tuple[str, list[list[float]]]:
    with storage.local_copy(model_uri) as folder:
        return speed.decode(folder, encode(load_tokenizer(folder), texts), config)


def _ask(workers: Workers, benchmark: ChoiceConfig, shots: int, figures: Figures) -> report.Benchmark:
    """One benchmark at one number of shots; its accuracies are added to the figures."""
    from app.evaluation import choices  # imports the harness
    from app.evaluation.modules import figure_of

    logger.info("%s, %d-shot", benchmark.name, shots)
    answers, num_cut = choices.score(benchmark, shots, partial(workers.compare, benchmark))
    name, protocol = f"{benchmark.name}_{shots}_shot", choices.describe(benchmark)
    subjects = [index for index, found in enumerate(answers.values()) for _ in found]
    is_right = [value for found in answers.values() for value in found]
    macro = metrics.accuracy(f"{name}_macro", f"{protocol}; mean over {len(answers)} subjects", len(answers))
    micro = metrics.accuracy(f"{name}_micro", f"{protocol}; mean over questions", 1)
    figures[macro.name] = _rounded(figure_of(macro, is_right=is_right, subject=subjects))
    figures[micro.name] = _rounded(figure_of(micro, is_right=is_right, subject=[0] * len(subjects)))
    asked = benchmark.endpoint_url or "the model directory"
    notes = [f"lm-evaluation-harness {choices.HARNESS_VERSION}, asked of {asked}"]
    if num_cut:
        notes.append(f"{num_cut} prompts were longer than the model's context and lost their beginning")
    shares = {subject: (round(sum(found) / len(found), 4), len(found)) for subject, found in answers.items()}
    return report.Benchmark(benchmark.name, shots, shares, notes)


def _resolve(benchmark: ChoiceConfig, config: EvaluateConfig) -> ChoiceConfig:
    given = {name: getattr(benchmark, name) for name in ("uri", "examples_uri")}
    return benchmark.with_overrides({name: config.resolve(uri) for name, uri in given.items() if uri})


def _asked(benchmark: ChoiceConfig) -> dict[str, Input]:
    """The files whose questions are asked, as they are now. Raises ValueError for one that is missing."""
    from app.evaluation import choices

    return raw_inputs(choices.scored_files(benchmark))


def _rounded(figure: Figure) -> Figure:
    value, low, high, n, tokenisation = figure
    return Figure(round(value, 4), round(low, 4), round(high, 4), n, tokenisation)


def _training_log(model_uri: str) -> list[dict[str, float]]:
    uri = f"{model_uri}/training_log.jsonl"
    if not storage.exists(uri):  # a model from elsewhere
        return []
    with storage.open_file(uri, "r", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
