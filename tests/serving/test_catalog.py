"""Which names the endpoint has and which engine answers: shares of a candidate, adapters that come and go."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from app.serving.catalog import LOOK_SECONDS, Adapters, Catalog, Version, unusable

MODEL, CANDIDATE = Version("m", "aa", 512), Version("m-candidate", "bb", 1024)


def write_adapter(folder: Path, name: str, **settings: Any) -> Path:
    path = folder / name
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | settings))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


def test_a_model_alone_answers_for_itself() -> None:
    catalog = Catalog([MODEL])
    assert list(catalog) == ["m"]
    assert catalog.choose("m") == "m"
    assert catalog.context_tokens == 512
    assert catalog["m"]["version"] == "aa"
    assert "parent" not in catalog["m"]
    with pytest.raises(KeyError):
        catalog["n"]


def test_a_candidate_takes_its_share_and_can_be_asked_alone() -> None:
    draws = iter(number / 100 for number in range(100))
    catalog = Catalog([MODEL, CANDIDATE], 25, draw=lambda: next(draws))
    assert Counter(catalog.choose("m") for _ in range(100)) == {"m": 75, "m-candidate": 25}
    assert catalog.choose("m-candidate") == "m-candidate"  # draws nothing: there is no number left
    assert [catalog.version_of(name).digest for name in catalog] == ["aa", "bb"]
    assert catalog.context_tokens == 1024


def test_a_candidate_without_traffic_gets_none() -> None:
    assert Catalog([MODEL, CANDIDATE], 0, draw=lambda: 0.0).choose("m") == "m"


def test_adapters_are_found_while_the_endpoint_runs(tmp_path: Path) -> None:
    now = [0.0]
    catalog = Catalog([MODEL, CANDIDATE], 100, Adapters(str(tmp_path), 16, clock=lambda: now[0]))
    assert list(catalog) == ["m", "m-candidate"]
    write_adapter(tmp_path, "poet")
    write_adapter(tmp_path, "m")  # the model has this name
    assert "poet" not in catalog
    now[0] += LOOK_SECONDS
    assert list(catalog) == ["m", "m-candidate", "poet"]
    assert catalog["poet"]["parent"] == "m"
    assert catalog.choose("poet") == "poet"
    assert catalog.version_of("poet") is MODEL
    assert [catalog.is_adapter(name) for name in ("m", "m-candidate", "poet", "nobody")] == [False, False, True, False]


def test_a_folder_that_goes_away_serves_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Adapters(str(tmp_path / "nowhere"), 16).names() == frozenset()
    assert "adapters.folder" in caplog.text


def test_what_cannot_be_served_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_adapter(tmp_path, "good")
    assert unusable(good, 8) is None
    high = write_adapter(tmp_path, "high", r=64)
    assert unusable(high, 16) == "its rank is 64; adapters.max_rank is 16"
    other = write_adapter(tmp_path, "other", peft_type="IA3")
    assert unusable(other, 16) == "it is not LoRA"
    (tmp_path / "empty").mkdir()
    pickled = write_adapter(tmp_path, "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = write_adapter(tmp_path, "broken")
    (broken / "adapter_config.json").write_bytes(b"\xff{")
    for name in ("..", "a b", ".hidden"):
        (tmp_path / name).mkdir(exist_ok=True)
    assert Adapters(str(tmp_path), 16).names() == {"good"}
    assert {record.message.split()[1] for record in caplog.records} == {"high", "other", "empty", "pickled", "broken"}
    assert "nothing is unpickled" in caplog.text
