"""Runs a command in a memory cgroup of its own, so that a limit holds for all that it takes: the page cache counts too.

Version 1 (``/sys/fs/cgroup/memory``) and version 2 of the kernel's interface, whichever has the memory controller and lets us make a
group. A group is made inside our own, so that limits above us still hold. Optionally the disk is slowed to a fixed rate.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

# The shell enters every group before it becomes the command: no byte of the command is counted elsewhere.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
NOT_ENTERED = 125
_numbers = count()


class Names(NamedTuple):
    """Files of a memory group in one version of the interface. swap: takes ``no_swap``, a number or None for the limit."""

    limit: str
    swap: str
    no_swap: str | None
    peak: str
    events: str
    enter: str = "cgroup.procs"


V1 = Names(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", None, "memory.max_usage_in_bytes", "memory.oom_control"
)
V2 = Names("memory.max", "memory.swap.max", "0", "memory.peak", "memory.events")


class Disk(NamedTuple):
    """A disk slowed to a rate. path: any file or folder on it."""

    path: Path
    bytes_per_s: int


@dataclass(frozen=True)
class Ended:
    """How a command ended. killed: for memory. peak_bytes: the most that its group held, page cache included; 0: not known."""

    code: int
    stdout: str
    stderr: str
    wall_s: float
    killed: bool = False
    timed_out: bool = False
    peak_bytes: int = 0

    @property
    def why(self) -> str:
        """One line: why it failed."""
        if self.killed:
            return "killed: it needs more memory than that"
        if self.timed_out:
            return f"took longer than {self.wall_s:.0f} s"
        lines = [line for line in self.stderr.splitlines() if line.strip()] or [f"ended with exit code {self.code}"]
        return lines[-1].strip()[:200]


class Unavailable(Exception):
    """No group can be made here; the text says why."""


def unavailable(disk: Disk | None = None) -> str:
    """Why no cage can be had here; empty where it can."""
    try:
        with cage(1 << 30, disk):
            return ""
    except Unavailable as why:
        return str(why)


def run(
    command: Sequence[object],
    limit_bytes: int | None = None,
    disk: Disk | None = None,
    timeout_s: float | None = None,
) -> Ended:
    """Run a command to its end; ``limit_bytes``: killed beyond that. Raises Unavailable where no group can be made."""
    with cage(limit_bytes, disk) as groups:
        enter = [*(str(group.folder / group.names.enter) for group in groups), "--", *map(str, command)]
        began = time.perf_counter()
        process = subprocess.Popen(
            ["/bin/sh", "-c", ENTER, "cage", *enter],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        timed_out = False
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # Also what the command started, and also when we are interrupted.
            if process.poll() is None:
                _kill(process.pid)
        if timed_out:
            stdout, stderr = process.communicate()
        wall_s = time.perf_counter() - began
        if process.returncode == NOT_ENTERED and "cage" in stderr:
            raise Unavailable(stderr.strip().splitlines()[-1])
        memory = next((group for group in groups if group.memory), None)
        return Ended(
            process.returncode,
            stdout,
            stderr,
            wall_s,
            killed=memory is not None and memory.kills() > 0,
            timed_out=timed_out,
            peak_bytes=memory.peak_bytes() if memory else 0,
        )


def drop_page_cache(paths: Iterable[Path]) -> None:
    """Make the kernel forget what it holds of these files and of those in these folders: the next run reads the disk."""
    for path in paths:
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            if not file.is_file():
                continue
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True)
class Group:
    """A cgroup that we made."""

    folder: Path
    names: Names
    memory: bool

    def kills(self) -> int:
        """Processes that the kernel killed in it for memory."""
        for line in _read(self.folder / self.names.events).splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
        return 0

    def peak_bytes(self) -> int:
        """The most that it held at once; 0 on kernels that do not say."""
        return int(_read(self.folder / self.names.peak) or 0)


@contextmanager
def cage(limit_bytes: int | None, disk: Disk | None = None) -> Iterator[list[Group]]:
    """Groups with these limits, to be entered; they are removed at the end. Raises Unavailable."""
    groups: list[Group] = []
    try:
        try:
            if limit_bytes is not None:
                groups.append(_limited(limit_bytes))
            if disk is not None:
                _slow(groups, disk)
        except OSError as error:
            raise Unavailable(f"{error.filename}: {error.strerror}") from error
        yield groups
    finally:
        for group in groups:
            _remove(group.folder)


def _limited(limit_bytes: int) -> Group:
    group = _make("memory")
    try:
        (group.folder / group.names.limit).write_text(str(limit_bytes))
        swap = group.folder / group.names.swap
        if swap.exists():  # else the kernel was built or started without counting swap
            swap.write_text(str(limit_bytes) if group.names.no_swap is None else group.names.no_swap)
    except OSError:
        _remove(group.folder)
        raise
    return group


def _slow(groups: list[Group], disk: Disk) -> None:
    """Slow the disk: in the group that is there (version 2), else in one of the block controller's own (version 1)."""
    device = disk_number(disk.path)
    group = next((group for group in groups if group.names is V2), None)
    if group is None:
        group = _make("blkio")
        groups.append(group)
    if group.names is V2:
        _enable(group.folder.parent, "io")
        (group.folder / "io.max").write_text(f"{device} rbps={disk.bytes_per_s}")
    else:
        (group.folder / "blkio.throttle.read_bps_device").write_text(f"{device} {disk.bytes_per_s}")


def disk_number(path: Path) -> str:
    """MAJOR:MINOR of the whole disk under a path. Raises Unavailable where the file system has none of its own."""
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        raise Unavailable(f"the file system of {path} lies on no block device that could be slowed")
    device = device.resolve()
    if (device / "partition").exists():  # only whole disks can be slowed
        device = device.parent
    return (device / "dev").read_text().strip()


def _make(controller: str) -> Group:
    """A new group of a controller (named as in version 1), inside our own. Raises Unavailable or OSError."""
    parents, names = parent_groups(controller)
    here = {"blkio": "io"}.get(controller, controller) if names is V2 else controller
    failure: OSError | None = None
    for parent in parents:
        folder = parent / f"klotski-cage-{os.getpid()}-{next(_numbers)}"
        try:
            if names is V2:
                _enable(parent, here)
            folder.mkdir()
            return Group(folder, names, controller == "memory")
        except OSError as error:
            failure = error
    raise failure or Unavailable(f"no cgroup with the {here} controller is here")


def _enable(parent: Path, controller: str) -> None:
    """Version 2: groups in ``parent`` get a controller. OSError where it lacks it, or holds processes and is not the root."""
    if controller not in _read(parent / "cgroup.subtree_control").split():
        (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def parent_groups(
    controller: str, mounts: Path = Path("/proc/self/mountinfo"), ours: Path = Path("/proc/self/cgroup")
) -> tuple[list[Path], Names]:
    """Where to make a group of a controller, best first: in our own group or, in version 2, beside it."""
    own = {words[1]: words[2] for words in (line.split(":", 2) for line in _read(ours).splitlines())}
    unified: list[Path] = []
    for line in _read(mounts).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, mount = before.split()[3:5]
        if kind == "cgroup" and controller in options.split(","):
            group = next((group for names, group in own.items() if controller in names.split(",")), "/")
            return [_below(Path(mount), root, group)], V1
        if kind == "cgroup2":
            where = _below(Path(mount), root, own.get("", "/"))
            unified = [where] if where == Path(mount) else [where, where.parent]
    return unified, V2


def _below(mount: Path, root: str, group: str) -> Path:
    """The folder of a group in a mount that shows the tree from ``root`` on."""
    folder = mount / (group.removeprefix(root) if root != "/" else group).strip("/")
    return folder if folder.is_dir() else mount


def _remove(folder: Path) -> None:
    """Remove a group; processes that just ended may hold it for a moment."""
    for _ in range(100):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


def _kill(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
