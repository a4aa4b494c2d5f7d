"""Hydra entry point: `python -m qbench [-m] [--dry-run] [GROUP=OPTION ...] [KEY=VALUE ...]`.

Progress and a readable summary go to stderr; the last line on stdout is one JSON object: the point's summary, with -m
the sweep's, and of a request that is refused the sentence that stderr has. Exit status: 0 done, 1 a point failed (its
result says why), 2 the request is wrong. Nothing heavy is imported until a point really runs, so `--help` and a typo
are answered at once. A sweep starts the process of each of its passes as `python -m qbench --pass FILE`.
"""

from __future__ import annotations

import sys

from qbench import entry

if __name__ == "__main__":
    entry.start()

import contextlib
import errno
import json
import logging.config
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qbench.config import Config, register
from qbench.errors import PlanError, RequestError, SweepFailed, WriteError
from qbench.record.disk import FULL
from qbench.request import experiment, overrides, wildcards
from qbench.request import explain as requests
from qbench.request.hubnames import spelled_out

if TYPE_CHECKING:
    from qbench.record.result import Result

DONE, FAILED, WRONG = 0, 1, 2


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    try:
        if sys.argv[1:2] == ["--pass"]:
            return _prepared_pass(sys.argv[2:])
        return _request()
    except KeyboardInterrupt:
        print("\ninterrupted; finished points are kept", file=sys.stderr)
        return 130
    except PlanError as error:
        print("qbench:", error, file=sys.stderr)
        return _refused(error)
    except RequestError as error:
        return _refuse(error)
    except SweepFailed:  # its last line says so already
        return FAILED
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        return _refuse(requests.explain(error, sys.argv[1:]))
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a path of the request
            long = f"{str(error.filename)[:40]}... is no path: a file's name has at most 255 bytes"
            return _refuse(RequestError(long))
        if isinstance(error, OSError) and error.errno in FULL:
            sentence = f"there is no room to write {error.filename or 'a file'}: {error.strerror}"
        else:
            sentence = entry.unexpected(error)
        _say(sentence)
        _print_json({"status": "failed", "error": sentence})
        return FAILED


def _request() -> int:
    """A point or a sweep, as Hydra reads the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    register()
    requests.register_plugins()
    sys.argv[1:] = spelled_out(sys.argv[1:])
    if "--dry-run" in sys.argv:  # of a sweep, if need be of one point
        rest = [a for a in sys.argv[1:] if a not in ("--dry-run", "-m", "--multirun")]
        sys.argv[1:] = ["-m", *rest, "hydra.sweeper.dry_run=true"]
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://qbench.conf", config_name="config")
    def point(composed: DictConfig) -> None:
        statuses.append(_point(composed))

    given = overrides.arguments(sys.argv[1:])
    overrides.check(given.overrides)
    requests.check_added(given.overrides)
    experiment.check(given.overrides, given.config_dir)
    if given.help and given.config_dir is None and not given.resolve:
        print(requests.help_text(given.overrides))
        return DONE
    if given.multirun:
        sys.argv[1:] = overrides.leave_to_points(sys.argv[1:])
    point()
    return max(statuses, default=DONE)


def _point(composed: DictConfig) -> int:
    """The exit status of a point that Hydra has composed."""

    def measure() -> Result:
        overrides.check_keys(composed)
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
        sweeper = HydraConfig.get().sweeper
        if sweeper.params or sweeper.also:
            raise RequestError("an experiment is a sweep of several points, and so takes -m: python -m qbench -m ...")
        wildcards.check_read([config])
        from qbench.run import run_point

        entry.begin_work()
        return run_point(config, list(HydraConfig.get().overrides.task))

    return _answer(measure)


def _prepared_pass(arguments: list[str]) -> int:
    """The exit status of a pass that a sweep has prepared: `--pass FILE`, see qbench/sweep/serve.py."""
    if len(arguments) != 1:
        raise RequestError("--pass takes one file, and nothing beside it")
    settings = resources.files("qbench.conf").joinpath("hydra", "job_logging", "stderr.yaml").read_text()
    logging.config.dictConfig(yaml.safe_load(settings))
    out, status = sys.stdout, DONE
    with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not spoil the lines
        from qbench.run import run_pass
        from qbench.sweep.serve import serve

        entry.begin_work()
        for line in serve(Path(arguments[0]), run_pass):
            _print_json(line, out)
            if line["status"] != "ok":
                status = FAILED
                _say(line["error"])
    return status


def _answer(measure: Callable[[], Result]) -> int:
    """Shows the result of a point, with its summary as the last line; returns the exit status."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not spoil the last line
            result = measure()
            from qbench.report import summary

            summary.show(result)
    except RequestError as error:
        return _refuse(error)
    except WriteError as error:  # who asked has at least what was measured
        _say(str(error))
        _print_json(error.result.summary())
        return FAILED
    _print_json(result.summary())
    return DONE if result.status == "ok" else FAILED


def _print_json(value: dict[str, Any], file: TextIO | None = None) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: what was done and recorded stays so
        print(json.dumps(value), file=file, flush=True)


def _say(message: str) -> None:
    print("qbench:", message.replace("\n", " "), file=sys.stderr)  # a name may hold a line break


def _refuse(error: RequestError) -> int:
    _say(str(error))
    return _refused(error)


def _refused(error: RequestError) -> int:
    """The last line: the sentence, the setting that it is about, and what it could be where that is a list."""
    said = str(error) if isinstance(error, PlanError) else str(error).replace("\n", " ")
    _print_json({"status": "refused", "error": said, "key": error.key, "choices": error.choices})
    return WRONG


if __name__ == "__main__":
    entry.end_as_interrupted()
    entry.leave(main)
