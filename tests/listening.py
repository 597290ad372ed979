"""Where the processes of a cluster listen."""

from __future__ import annotations

from contextlib import suppress

import psutil

from app.cluster import LocalCluster
from tests.warm_workers import family

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def assert_private(cluster: LocalCluster) -> None:
    """None of them, of all that run now, can be reached from another machine."""
    found = []
    for process in (psutil.Process(cluster.pid), *family(cluster)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += [(process.name(), one) for one in process.net_connections("tcp")]
    listening = [(name, one.laddr) for name, one in found if one.status == psutil.CONN_LISTEN]
    assert listening
    assert not [(name, address) for name, address in listening if address.ip not in LOOPBACK]
