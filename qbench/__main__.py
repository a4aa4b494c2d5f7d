"""Hydra entry point: `python -m qbench [-m] [--dry-run] [GROUP=OPTION ...] [KEY=VALUE ...]`.

Progress and a readable summary go to stderr; the last line on stdout is one JSON object, the point's summary or, with
-m, the sweep's. Exit status: 0 done, 1 a point failed (its result says why), 2 the request is wrong. Nothing heavy is
imported until a point really runs, so `--help` and a typo are answered at once.
"""

from __future__ import annotations

import sys

from qbench import entry

if __name__ == "__main__":
    entry.start()

import contextlib
import json
import os
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qbench.config import Config, register
from qbench.errors import RequestError, WriteError
from qbench.record.disk import FULL
from qbench.request import experiment, overrides
from qbench.request import explain as requests
from qbench.request.hubnames import spelled_out

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
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://qbench.conf", config_name="config")
    def point(composed: DictConfig) -> None:
        statuses.append(_point(composed))

    try:
        given = overrides.arguments(sys.argv[1:])
        overrides.check(given.overrides)
        experiment.check(given.overrides, given.config_dir)
        if given.multirun:
            sys.argv[1:] = overrides.leave_to_points(sys.argv[1:])
        point()
    except KeyboardInterrupt:
        print("\ninterrupted; finished points are kept", file=sys.stderr)
        return 130
    except RequestError as error:
        return _refuse(str(error))
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        return _refuse(requests.explain(error, sys.argv[1:]))
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _refuse(f"there is no room to write {error.filename or 'a file'}: {error.strerror}")
        else:
            _refuse(entry.unexpected(error))
        return FAILED
    return max(statuses, default=DONE)


def _point(composed: DictConfig) -> int:
    command = list(HydraConfig.get().overrides.task)
    try:
        overrides.check_keys(composed)
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
        with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not spoil the last line
            from qbench.report import summary
            from qbench.run import run_point

            result = run_point(config, command)
            summary.show(result)
    except RequestError as error:
        return _refuse(str(error))
    except WriteError as error:  # who asked has at least what was measured
        _refuse(str(error))
        _print_json(error.result.summary())
        return FAILED
    _print_json(result.summary())
    return DONE if result.status == "ok" else FAILED


def _print_json(value: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: what was done and recorded stays so
        print(json.dumps(value), flush=True)


def _refuse(message: str) -> int:
    print("qbench:", message.replace("\n", " "), file=sys.stderr)  # a name may hold a line break
    return WRONG


if __name__ == "__main__":
    entry.leave(main)
