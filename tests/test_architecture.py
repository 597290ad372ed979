"""The house rules, checked on the syntax trees of app/ and jobs/."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "app").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
STAGES = {
    "corpus",
    "augmentation",
    "tokens",
    "conversations",
    "training",
    "evaluation",
    "quantization",
    "serving",
    "tuning",
}
MAY_READ = {
    "pipeline": STAGES,
    "planning": {"training"},
    "tuning": {"training"},
}  # a package -> stage packages that it may import
FOUNDATION = {
    "block_attention",
    "block_qwen3",
    "config",
    "devices",
    "documents",
    "records",
    "storage",
    "logs",
    "artifacts",
    "cluster",
    "models",
    "overlays",
    "page",
    "privacy",
}
MAY_IMPORT = {  # a foundation module -> foundation modules it may import
    "config": set(),
    "devices": set(),
    "records": set(),
    "storage": {"config", "records"},
    "logs": {"config", "records"},
    "artifacts": {"config", "records", "storage"},
    "documents": {"records", "storage"},
    "cluster": {"config", "records", "storage", "logs"},
    "block_attention": set(),
    "block_qwen3": {"block_attention"},
    "models": {"block_qwen3", "config", "records", "storage"},
    "overlays": set(),
    "page": set(),
    "privacy": {"config", "records"},
}
RAY = {"cluster.py", "training/worker.py", "training/telemetry.py", "evaluation/generation.py"}
RAY |= {"serving/gateway.py", "serving/deployment.py", *(f"{stage}/stage.py" for stage in STAGES | {"pipeline"})}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at any depth, type checking aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "app").with_suffix("")
    return relative.parts[0]


def test_layers() -> None:
    wrong = []
    for path in FILES:
        package = package_of(path)
        for name in imports(path):
            if not name.startswith("app."):
                continue
            target = name.split(".")[1]
            foundation_ok = package not in MAY_IMPORT or target in MAY_IMPORT[package]
            stage_ok = target in FOUNDATION or target == package or target in MAY_READ.get(package, ())
            if not (foundation_ok and stage_ok):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_nothing_in_app_imports_jobs() -> None:
    assert not [path for path in FILES if any(name.split(".")[0] == "jobs" for name in imports(path))]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", RAY),
        ("deepspeed", {f"training/{path.name}" for path in FILES if package_of(path) == "training"}),
        (
            "vllm",
            {"evaluation/speed.py", *(f"serving/{path.name}" for path in FILES if package_of(path) == "serving")},
        ),
        ("llmcompressor", {"quantization/awq.py", "quantization/stage.py"}),
        ("awq", {"quantization/autoawq.py"}),
        ("pickle", set()),
    ],
)
def test_a_library_is_imported_only_where_it_belongs(library: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(ROOT / "app").as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= allowed


def test_config_modules_load_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "vllm", "deepspeed", "pyarrow", "datasets", "tokenizers"}
    for path in FILES:
        if path.name == "config.py":
            assert not heavy & {name.split(".")[0] for name in imports(path)}, path


def test_budgets() -> None:
    over = []
    for path in FILES:
        source = path.read_text()
        if source.count("\n") > 400:
            over.append(f"{path.name}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                if lines > (120 if path.name == "loop.py" else 80) or len(arguments) > 5:
                    over.append(f"{path.name}:{node.name}: {lines} lines, {len(arguments)} parameters")
    assert not over


def test_every_module_says_what_it_does() -> None:
    silent = [path for path in FILES if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_catch_all_module_names() -> None:
    assert not {"utils", "helpers", "common", "misc", "manager", "base", "core"} & {path.stem for path in FILES}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_shadows_no_module_and_stays_thin(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names
    assert importlib.util.find_spec(path.stem) is None  # a folder on sys.path wins: `evaluate.py` would break evaluate
    assert path.read_text().count("\n") <= 40
    assert ast.get_docstring(ast.parse(path.read_text()))
