"""What ServeConfig becomes for vLLM, on a CPU and on a GPU, and what it refuses."""

import ast
from pathlib import Path
from typing import Any

import pytest

from app.config import validate
from app.serving.config import AskConfig, DeployConfig, ServeConfig
from app.serving.engine import engine_arguments, engine_environment, model_source

MODEL = {"model_uri": "/somewhere/quantized"}


def test_a_cpu_computes_in_float32_with_a_fixed_cache() -> None:
    config = validate(ServeConfig, MODEL | {"kv_cache_gib": 3, "enforce_eager": True, "max_model_len": 128})
    arguments = engine_arguments(config, use_gpu=False)
    assert (arguments["dtype"], arguments["enforce_eager"], arguments["max_model_len"]) == ("float32", True, 128)
    assert "tensor_parallel_size" not in arguments
    assert engine_environment(config, use_gpu=False)["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_a_gpu_computes_in_bfloat16_and_finds_its_own_cache() -> None:
    config = validate(ServeConfig, MODEL | {"gpus_per_replica": 4})
    arguments = engine_arguments(config, use_gpu=True)
    assert (arguments["dtype"], arguments["tensor_parallel_size"]) == ("bfloat16", 4)
    assert "max_model_len" not in arguments  # the model's own
    assert not any("CPU" in name for name in engine_environment(config, use_gpu=True))


@pytest.mark.parametrize("use_gpu", [False, True])
def test_dtype_is_kept_and_no_code_from_a_model_runs(use_gpu: bool) -> None:
    arguments = engine_arguments(validate(ServeConfig, MODEL | {"dtype": "float32"}), use_gpu)
    assert (arguments["dtype"], arguments["trust_remote_code"]) == ("float32", False)
    assert arguments["load_format"] == "safetensors"


def test_a_bucket_is_mirrored_and_a_folder_is_read_in_place() -> None:
    assert model_source("s3://bucket/quantized") == {"bucket_uri": "s3://bucket/quantized"}
    assert model_source("/somewhere/quantized") == "/somewhere/quantized"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_uri": "runs/quantized"}, "must be an absolute path or a URI"),
        ({"min_replicas": 3}, "max_replicas must not be below min_replicas"),
        ({"dtype": "float16"}, "dtype: "),
        ({"enforce_eagre": True}, "enforce_eagre: unknown key; did you mean enforce_eager"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(ServeConfig, MODEL | change)


@pytest.mark.parametrize("config_type", [ServeConfig, DeployConfig, AskConfig])
def test_every_setting_is_described(config_type: type[ServeConfig]) -> None:
    assert not [name for name, field in config_type.model_fields.items() if not field.description]


def test_the_builder_keeps_its_annotation() -> None:
    """As a string, which a `__future__` import makes of it, Serve would hand `args:` over unchecked."""
    root = Path(__file__).resolve().parents[2]
    tree = ast.parse((root / "app" / "serving" / "deployment.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    (builder,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "build_app"]
    annotation = builder.args.args[0].annotation
    assert isinstance(annotation, ast.Name)
    assert annotation.id == "ServeConfig"
