"""Every shipped YAML is valid for its job, and every job answers --help."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.augmentation.config import AugmentConfig
from app.config import Config, read_yaml, validate
from app.conversations.config import CheckConversationsConfig, PackConversationsConfig
from app.corpus.config import CorpusConfig, DemoCorpusConfig
from app.evaluation.config import EvaluateConfig, ParityConfig
from app.pipeline.config import PipelineConfig
from app.planning.config import PlanConfig
from app.quantization.config import QuantizeConfig
from app.serving.config import AskConfig, DeployConfig, ServeConfig
from app.tokens.config import PackConfig, TokenizerConfig
from app.training.config import TrainConfig
from app.tuning.config import TuneConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS: dict[str, type[Config]] = {
    "prepare_corpus": CorpusConfig,
    "fetch_demo_corpus": DemoCorpusConfig,
    "augment_corpus": AugmentConfig,
    "train_tokenizer": TokenizerConfig,
    "pack_tokens": PackConfig,
    "check_conversations": CheckConversationsConfig,
    "pack_conversations": PackConversationsConfig,
    "train_model": TrainConfig,
    "tune_model": TuneConfig,
    "evaluate_model": EvaluateConfig,
    "quantize_model": QuantizeConfig,
    "deploy_model": DeployConfig,
    "check_parity": ParityConfig,
    "ask_model": AskConfig,
    "run_pipeline": PipelineConfig,
    "plan_capacity": PlanConfig,
}
FILES = sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_yaml_is_valid(path: Path) -> None:
    config_type = CONFIGS[path.stem]
    config = validate(config_type, read_yaml(config_type, path))
    assert config.with_overrides({}) == config


@pytest.mark.parametrize("size", ["demo", "1b", "7b", "13b", "70b"])
def test_there_is_a_pipeline_of_every_size(size: str) -> None:
    assert ROOT / "jobs" / "configs" / size / "run_pipeline.yaml" in FILES


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_every_job_answers_help(path: Path) -> None:
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert "--dry-run" in result.stdout


def test_serve_config_passes_rays_schema_and_ours() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "app.serving.deployment:build_app"
    validate(ServeConfig, application.args)
    with pytest.raises(ValueError, match="model_idd: unknown key; did you mean model_id"):
        validate(ServeConfig, {**application.args, "model_idd": "x"})
