"""What one point may use of its host, so that points that run at the same time do not meet.

A GPU is one point's at a time, for all sweeps and single commands of a user on the host; cores are shared out among
the points of one sweep. A share is an flock on a file, so it ends with the process that holds it, however that ends.
A GPU's lock has the name of its UUID: `CUDA_VISIBLE_DEVICES=0` and `=GPU-5c...` may be the same card.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from qbench.errors import RequestError
from qbench.record.store import identity

log = logging.getLogger(__name__)

HELD = "QBENCH_GPU"  # the UUID whose lock a process inherits from the sweep that started it
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Share:
    """What one of the points that run side by side on a host may use."""

    lock: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Gpu:
    name: str  # as CUDA_VISIBLE_DEVICES says it
    uuid: str


def host_shares(gpus: Sequence[Gpu], jobs: int, folder: Path) -> tuple[tuple[Share, ...], tuple[Share, ...]]:
    """The shares of this host for `jobs` points at a time, and the slots that limit them where GPUs are more than that.

    A share is one GPU where there are any, else an equal part of the cores, counted for the sweep that writes to
    `folder`. OMP_NUM_THREADS is left alone where the user has set it.
    """
    jobs = min(jobs, len(gpus)) if gpus else jobs
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    sweep = identity(str(folder.resolve()))
    slots = tuple(Share(str(_common() / f"{sweep}-{i}.lock"), threads) for i in range(jobs))
    if not gpus:
        return slots, ()
    shares = tuple(
        Share(_gpu_lock(gpu.uuid), threads | {"CUDA_VISIBLE_DEVICES": gpu.name, HELD: gpu.uuid}) for gpu in gpus
    )
    return shares, slots if jobs < len(gpus) else ()


@contextmanager
def one_of(*kinds: Sequence[Share]) -> Iterator[tuple[list[int], dict[str, str]]]:
    """Waits for a free share of each kind; gives the locks' descriptors, for a process to inherit, and its environment.

    A kind without any share needs none.
    """
    with ExitStack() as held:
        descriptors, environment = [], {}
        for shares in kinds:
            if shares:
                descriptor, share = held.enter_context(_taken(shares))
                descriptors.append(descriptor)
                environment |= share.environment
        yield descriptors, environment


@contextmanager
def gpu_of(device: Any) -> Iterator[None]:
    """Holds the GPU of a torch `device` while this process computes there; nothing for a CPU.

    Waits, and says so, while another process of qbench has it. A point of a sweep that was given one holds it already.
    """
    if device.type != "cuda":
        yield
        return
    import torch

    uuid = str(torch.cuda.get_device_properties(device.index or 0).uuid)
    if os.environ.get(HELD) == uuid:
        yield
        return
    with _taken((Share(_gpu_lock(uuid), {}),), f"GPU {uuid}"):
        yield


def gpus() -> list[Gpu]:
    """The GPUs that torch sees, by UUID; asked in another process, since to ask takes memory on each of them.

    Raises RequestError when torch cannot say.
    """
    program = "import torch as t; print(*(t.cuda.get_device_properties(i).uuid for i in range(t.cuda.device_count())))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RequestError(f"torch cannot tell which GPUs there are: {last}")
    uuids = done.stdout.split()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible if len(visible) >= len(uuids) else [str(i) for i in range(len(uuids))]
    return [Gpu(name, uuid) for name, uuid in zip(names, uuids, strict=False)]


def cores() -> int:
    """Cores that this process may use, by its affinity and by the CPU quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min([count, *map(int, _quotas())])


def _quotas() -> Iterator[float]:
    """Cores that control groups allow: `cpu.max` of version 2, `cpu.cfs_quota_us` of version 1."""
    folders = [CGROUPS, CGROUPS / "cpu"]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = CGROUPS / "cpu" if controllers else CGROUPS
                group = root / path.lstrip("/")
                folders += [group, *(p for p in group.parents if root in p.parents)]
    except (OSError, ValueError):
        pass
    for folder in dict.fromkeys(folders):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            try:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            except OSError:
                continue
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1: no limit
            yield max(1.0, int(quota) / int(period))


def _gpu_lock(uuid: str) -> str:
    return str(_common() / f"gpu-{uuid.removeprefix('GPU-')}.lock")


def _common() -> Path:
    return Path(tempfile.gettempdir()) / f"qbench-{os.getuid()}"  # of this host, not of a shared file system


@contextmanager
def _taken(shares: Sequence[Share], what: str | None = None) -> Iterator[tuple[int, Share]]:
    """Waits for a free one of the shares; with `what`, says once what is waited for."""
    while True:
        for share in shares:
            path = Path(share.lock)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if lock_descriptor(descriptor, blocking=False):
                    yield descriptor, share
                    return
            finally:
                os.close(descriptor)  # the lock lives on while a process holds the same open file
        if what is not None:
            log.info("%s: another process of qbench uses it, waiting", what)
            what = None
        time.sleep(0.2)
