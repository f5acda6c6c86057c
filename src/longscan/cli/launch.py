"""`longscan train --nproc N`: the same command in several processes here, through torchrun's own launcher."""

from __future__ import annotations

import os
import sys
import uuid


def launch(processes: int, max_restarts: int) -> int:
    """Run this command's own arguments in several processes; each finds its rank in its environment.

    Ctrl-C and SIGTERM are handed to all of them, which then have half a minute to save.

    Returns:
        The exit code: 0, that of the process that failed first, or 130 or 143 after a stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As many threads in all as there are cores; torchrun itself would give each process one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "longscan", *sys.argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
