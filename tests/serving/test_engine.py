"""What ServeConfig becomes for vLLM, on a CPU and on a GPU, and what it refuses."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from app.config import validate
from app.serving.config import AskConfig, DeployConfig, ServeConfig
from app.serving.engine import (
    Machine,
    context_tokens,
    engine_arguments,
    engine_environment,
    model_source,
    read_machine,
    refuse_untried,
)

MODEL = {"model_uri": "/somewhere/quantized", "max_model_len": 512}
GIB = 1 << 30
LAPTOP = Machine(num_cores=2, available_bytes=20 * GIB)
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}
TOKEN_BYTES = 2 * 4 * 4 * 32 * 4  # keys and values, layers, heads, width, float32


@pytest.fixture(name="model")
def model_fixture(tmp_path: Path) -> dict[str, Any]:
    """Of the demo's shape, at a context of 512 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": 512}))
    return {"model_uri": str(tmp_path)}


def test_a_cpu_computes_in_float32_with_what_is_given() -> None:
    given = {"kv_cache_gib": 1.5, "enforce_eager": True, "threads_per_replica": 3, "max_num_seqs": 5}
    config = validate(ServeConfig, MODEL | given | {"max_num_batched_tokens": 99, "gpu_memory_utilization": 0.5})
    assert engine_arguments(config, use_gpu=False) == {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 3 * GIB // 2,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 99,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    assert engine_environment(config, use_gpu=False)["OMP_NUM_THREADS"] == "3"


def test_a_gpu_computes_in_bfloat16_and_finds_the_rest() -> None:
    config = validate(ServeConfig, {"model_uri": "/somewhere", "gpus_per_replica": 4})
    assert engine_arguments(config, use_gpu=True) == {
        "dtype": "bfloat16",
        "enforce_eager": False,
        "tensor_parallel_size": 4,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    assert set(engine_environment(config, use_gpu=True)) == {"HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"}
    half = validate(ServeConfig, MODEL | {"gpu_memory_utilization": 0.5})
    assert engine_arguments(half, use_gpu=True)["gpu_memory_utilization"] == 0.5


def test_a_small_model_gets_little_cache_of_a_machine_with_much_memory(model: dict[str, Any]) -> None:
    found = engine_arguments(validate(ServeConfig, model), use_gpu=False, machine=LAPTOP)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (64, 2048)
    assert found["kv_cache_memory_bytes"] == 256 << 20  # sixteen sequences would take 32 MiB


def test_the_cache_holds_sixteen_full_sequences_and_one_block(model: dict[str, Any]) -> None:
    config = validate(ServeConfig, model | {"max_model_len": 8000})  # 62.5 blocks of 128 tokens
    found = engine_arguments(config, use_gpu=False, machine=LAPTOP)
    assert found["kv_cache_memory_bytes"] == (16 * 63 + 1) * 128 * TOKEN_BYTES


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, 5 * GIB),
        ({"max_replicas": 2}, 5 * GIB // 2),
    ],
)
def test_caches_of_all_replicas_leave_three_quarters_of_the_memory(
    model: dict[str, Any], change: dict[str, Any], wanted: int
) -> None:
    config = validate(ServeConfig, model | {"max_model_len": 200_000} | change)
    assert engine_arguments(config, use_gpu=False, machine=LAPTOP)["kv_cache_memory_bytes"] == wanted


def test_one_sequence_fits_whatever_the_memory(model: dict[str, Any]) -> None:
    config = validate(ServeConfig, model | {"max_model_len": 128_000})
    found = engine_arguments(config, use_gpu=False, machine=Machine(num_cores=1, available_bytes=GIB))
    assert found["kv_cache_memory_bytes"] == (1000 + 1) * 128 * TOKEN_BYTES


def test_bfloat16_halves_the_cache_and_heads_need_not_be_grouped(model: dict[str, Any], tmp_path: Path) -> None:
    shape = SHAPE | {"head_dim": 64, "max_position_embeddings": 12_800}
    del shape["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": shape}))
    config = validate(ServeConfig, model | {"dtype": "bfloat16"})
    found = engine_arguments(config, use_gpu=False, machine=LAPTOP)
    assert found["kv_cache_memory_bytes"] == (16 * 100 + 1) * 128 * (2 * 4 * 8 * 64 * 2)


@pytest.mark.parametrize(
    ("num_cores", "change", "wanted"),
    [
        (1, {}, "1"),
        (2, {}, "1"),
        (2, {"max_replicas": 2}, "1"),
        (16, {}, "15"),
        (16, {"max_replicas": 2}, "7"),
        (16, {"candidate": {"model_uri": "/elsewhere"}}, "7"),
    ],
)
def test_replicas_share_the_cores_and_none_is_bound_to_some(
    num_cores: int, change: dict[str, Any], wanted: str
) -> None:
    config = validate(ServeConfig, MODEL | change)
    found = engine_environment(config, use_gpu=False, machine=Machine(num_cores, GIB))
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_OMP_THREADS_BIND"]) == (wanted, "nobind")


def test_a_model_that_does_not_tell_its_shape_is_named(model: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"max_model_len: .*config.json does not tell the context"):
        context_tokens(validate(ServeConfig, model))
    with pytest.raises(ValueError, match=r"kv_cache_gib: .*config.json has no 'num_attention_heads'"):
        engine_arguments(validate(ServeConfig, model), use_gpu=False, machine=LAPTOP)


def test_chosen_blocks_are_served_on_cpus_alone(model: dict[str, Any], tmp_path: Path) -> None:
    adapters = {"adapters": {"folder": "/adapters"}}
    refuse_untried(validate(ServeConfig, model | adapters), use_gpu=True)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"attention_block_tokens": 128}))
    refuse_untried(validate(ServeConfig, model), use_gpu=False)
    with pytest.raises(ValueError, match="served on CPUs without adapters, and not with a GPU"):
        refuse_untried(validate(ServeConfig, model), use_gpu=True)
    with pytest.raises(ValueError, match=r"and not with adapters.folder"):
        refuse_untried(validate(ServeConfig, model | adapters), use_gpu=False)


LATENT = SHAPE | {
    "model_type": "deepseek_v3",
    "max_position_embeddings": 12_800,
    "head_dim": 16,  # transformers writes the rotary part here
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 48,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


def test_latent_attention_on_a_cpu_is_computed_as_plain_attention(model: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LATENT))
    config = validate(ServeConfig, model)
    found = engine_arguments(config, use_gpu=False, machine=LAPTOP)
    assert found["kv_cache_memory_bytes"] == (16 * 100 + 1) * 128 * (2 * 4 * 8 * 64 * 4)
    assert found["compilation_config"] == {"custom_ops": ["-rotary_embedding"]}
    assert engine_environment(config, use_gpu=False, machine=LAPTOP)["VLLM_MLA_DISABLE"] == "1"
    assert "compilation_config" not in engine_arguments(config, use_gpu=True)
    assert "VLLM_MLA_DISABLE" not in engine_environment(config, use_gpu=True)


@pytest.mark.parametrize(
    ("change", "use_gpu", "said"),
    [
        ({"topk_method": None}, True, 'must say "topk_method": "noaux_tc": vLLM would send tokens to other experts'),
        ({"scoring_func": "softmax"}, False, 'must say "scoring_func": "sigmoid"'),
        ({"qk_nope_head_dim": 32}, False, "its heads are 48 wide, their values 32; vLLM's attention on a CPU takes"),
        ({"v_head_dim": 96}, False, "its heads are 64 wide, their values 96"),
    ],
)
def test_a_deepseek_that_would_answer_otherwise_is_refused(
    model: dict[str, Any], tmp_path: Path, change: dict[str, Any], use_gpu: bool, said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LATENT | change))
    with pytest.raises(ValueError, match=said):
        engine_arguments(validate(ServeConfig, model), use_gpu, machine=LAPTOP)


def test_this_machine_has_cores_and_memory() -> None:
    found = read_machine()
    assert 1 <= found.num_cores <= len(os.sched_getaffinity(0))
    assert 0 < found.available_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("use_gpu", [False, True])
def test_dtype_is_kept_and_no_code_from_a_model_runs(use_gpu: bool) -> None:
    arguments = engine_arguments(validate(ServeConfig, MODEL | {"dtype": "float32", "kv_cache_gib": 1}), use_gpu)
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
