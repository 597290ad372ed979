import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from app.config import Config, RunConfig, load_config


class Optimizer(Config):
    learning_rate: float = Field(1e-3, gt=0, description="peak")


class Train(RunConfig):
    optimizer: Optimizer = Optimizer()
    num_steps: int = Field(10, ge=1)
    name: str = "demo"


def test_command_line_wins_over_yaml_wins_over_default(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("num_steps: 20\noptimizer: {learning_rate: 1e-5}\n")
    config = load_config(Train, argv=["--config", str(file), "--num_steps", "30"])
    assert (config.num_steps, config.optimizer.learning_rate, config.name) == (30, 1e-5, "demo")


def test_a_section_may_be_another_file(tmp_path: Path) -> None:
    (tmp_path / "optimizer.yaml").write_text("learning_rate: 0.5\n")
    (tmp_path / "train.yaml").write_text("optimizer: optimizer.yaml\n")
    assert load_config(Train, argv=["--config", str(tmp_path / "train.yaml")]).optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.learning_rat", "1"], "unknown key; did you mean optimizer.learning_rate?"),
        (["--num_stepz", "1"], "num_stepz: unknown key; did you mean num_steps?"),
        (["--zzzzzz", "1"], "zzzzzz: unknown key; known keys: storage_uri, overwrite"),
        (["--num_steps", "many"], "num_steps: Input should be a valid integer"),
        (["--num_steps", "0"], "greater than or equal to 1 (got 0)"),
        (["--num_steps.deep", "1"], "num_steps: Input should be a valid integer"),
        (["--num_steps"], "--num_steps: needs a value"),
        (["num_steps"], "'num_steps': expected --section.field VALUE"),
        (["--config", "/nowhere.yaml"], "--config: /nowhere.yaml does not exist"),
    ],
)
def test_a_wrong_key_or_value_is_named_and_exits_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(Train, argv=argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [1", "\xff\xfe"])
def test_a_broken_yaml_names_the_file(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit) as stop:
        load_config(Train, argv=["--config", str(file)])
    assert stop.value.code == 2
    assert str(file) in capsys.readouterr().err


def test_dry_run_prints_yaml_that_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(Train, argv=["--dry-run", "--num_steps", "7"])
    assert stop.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(Train, argv=["--config", str(file)]).num_steps == 7


def test_overrides_are_validated() -> None:
    assert Train().with_overrides({"optimizer.learning_rate": 0.1}).optimizer.learning_rate == 0.1
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate"):
        Train().with_overrides({"optimizer.learning_rate": -1})


def test_a_relative_uri_needs_an_absolute_root() -> None:
    assert Train(storage_uri="s3://bucket/run/").resolve("corpus") == "s3://bucket/run/corpus"
    assert Train(storage_uri="/data").resolve("/elsewhere/corpus") == "/elsewhere/corpus"
    with pytest.raises(ValueError, match="set storage_uri"):
        Train().resolve("corpus")
    with pytest.raises(ValueError, match="must be absolute"):
        Train(storage_uri="runs").resolve("corpus")


def test_config_modules_import_nothing_heavy() -> None:
    packages = sorted(path.parent.name for path in Path("app").glob("*/config.py"))
    heavy = {"torch", "transformers", "ray", "vllm", "fsspec", "pyarrow"}
    imports = "; ".join(f"import app.{package}.config" for package in packages)
    check = f"{imports}; import sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "[]"
