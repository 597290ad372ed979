import errno

import pytest

from app.logs import job, user_error


class WrappedError(Exception):
    """As Ray wraps: the original is in `cause`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class WorkersFailedError(Exception):
    """As Ray Train wraps: the originals by rank."""

    def __init__(self) -> None:
        self.worker_failures = {0: RuntimeError("peer lost"), 1: ValueError("loss is nan")}


def test_the_users_error_is_found_under_wrappers() -> None:
    assert str(user_error(WrappedError(WrappedError(ValueError("bad key"))))) == "bad key"
    assert str(user_error(WorkersFailedError())) == "loss is nan"
    assert user_error(OSError(errno.ENOSPC, "No space left on device")) is not None
    assert user_error(RuntimeError("ours")) is None
    assert user_error(UnicodeDecodeError("utf-8", b"", 0, 1, "a subclass is a bug of ours")) is None
    assert user_error(FileNotFoundError(errno.ENOENT, "ours")) is None


def test_a_job_ends_with_2_for_the_user_and_a_traceback_for_us(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, job():
        raise WrappedError(ValueError("first line\nsecond line"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first line\nerror: second line\n"
    with pytest.raises(RuntimeError), job():
        raise RuntimeError("ours")
