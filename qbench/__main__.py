"""Hydra entry point: `python -m qbench [-m] [--dry-run] [GROUP=OPTION ...] [KEY=VALUE ...]`.

Progress and a readable summary go to stderr; the last line on stdout is one JSON object, the point's summary or, with
-m, the sweep's. Exit status: 0 done, 1 a point failed (its result says why), 2 the request is wrong. Nothing heavy is
imported until a point really runs, so `--help` and a typo are answered at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qbench import requests
from qbench.config import Config, register
from qbench.errors import RequestError
from qbench.hubnames import spelled_out

DONE, FAILED, WRONG = 0, 1, 2


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    register()
    requests.add_third_party_conf()
    sys.argv[1:] = spelled_out(sys.argv[1:])
    if "--dry-run" in sys.argv:  # of a sweep, if need be of one point
        rest = [a for a in sys.argv[1:] if a not in ("--dry-run", "-m", "--multirun")]
        sys.argv[1:] = ["-m", *rest, "hydra.sweeper.dry_run=true"]
    if {"-m", "--multirun"} & set(sys.argv):
        with contextlib.suppress(HydraException):  # an argument that cannot be read is refused below
            sys.argv[1:] = requests.leave_to_points(sys.argv[1:])
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://qbench.conf", config_name="config")
    def point(composed: DictConfig) -> None:
        statuses.append(_point(composed))

    try:
        point()
    except KeyboardInterrupt:
        print("\ninterrupted; finished points are kept", file=sys.stderr)
        return 130
    except RequestError as error:
        return _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(requests.explain(error, sys.argv[1:]))
    return max(statuses, default=DONE)


def _point(composed: DictConfig) -> int:
    command = list(HydraConfig.get().overrides.task)
    try:
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
        with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not spoil the last line
            from qbench import summary
            from qbench.run import run_point

            result = run_point(config, command)
            summary.show(result)
    except MissingMandatoryValue as error:
        return _refuse(f"{error.full_key} must be set: {error.full_key}=VALUE")
    except RequestError as error:
        return _refuse(str(error))
    _print_json(result.summary())
    return DONE if result.status == "ok" else FAILED


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _refuse(message: str) -> int:
    print(f"qbench: {message}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    sys.exit(main())
