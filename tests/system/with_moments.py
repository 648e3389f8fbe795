"""The command line on the cluster of RAY_ADDRESS; the processes of the run know the moments of the variable MOMENTS."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray

from pipeline.cli import main
from tests.system.moments import VARIABLE

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    ray.init(
        address=os.environ["RAY_ADDRESS"],
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={
            # Ray runs the hook before a worker knows where the driver's modules are.
            "env_vars": {VARIABLE: os.environ[VARIABLE], "PYTHONPATH": str(ROOT)},
            "worker_process_setup_hook": "tests.system.moments.install",
        },
    )
    main()
