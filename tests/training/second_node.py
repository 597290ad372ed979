"""A second raylet on this machine, on loopback, until it is killed: `python -m tests.training.second_node ADDRESS`.

`ray start` refuses a second node while loopback is asked for (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0), so this starts the
node as Ray's own cluster_utils does.
"""

import sys
import time

from ray._private.node import Node
from ray._private.parameter import RayParams

if __name__ == "__main__":
    parameters = RayParams(
        gcs_address=sys.argv[1],
        redis_address=sys.argv[1],
        node_ip_address="127.0.0.1",
        node_manager_port=0,
        num_cpus=1,
        num_gpus=0,
        object_store_memory=100 << 20,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
    )
    node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
    while True:
        time.sleep(3600)
