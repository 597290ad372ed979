"""A folder that another job began is refused with what differs; the same job goes on; or the place is taken."""

from pathlib import Path

import pytest

from app.training.record import find_same, write

NOW = {"settings": {"seed": 0, "space.seed": [1, 2]}, "data": {"tokens": "a"}}


def look(folder: Path, overwrite: bool = False, **settings: int) -> object:
    now = NOW | {"settings": NOW["settings"] | settings}
    return find_same(str(folder), "sweep.json", "trials_uri", now, overwrite)


def test_the_same_job_goes_on_with_what_its_owner_wrote(tmp_path: Path) -> None:
    assert look(tmp_path) is None
    write(str(tmp_path), "sweep.json", NOW | {"name": "monday"})
    assert look(tmp_path) == NOW | {"name": "monday"}


def test_another_job_is_refused_or_takes_the_place(tmp_path: Path) -> None:
    folder = tmp_path / "trials"
    write(str(folder), "sweep.json", NOW)
    with pytest.raises(ValueError, match=r"trials holds a sweep with seed: 0, now 1\nit cannot .* set trials_uri to"):
        look(folder, seed=1)
    assert look(folder)
    assert look(folder, overwrite=True, seed=1) is None
    assert not folder.exists()
