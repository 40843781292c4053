"""A process gives up the right to read some files, for good (Landlock, Linux 5.13 and newer).

The kernel only knows what is allowed: everything beside the path to a hidden file is.  So nothing new can be made
right in the folders on that path.  Nor can such a process look into one that has not given up as much.

It holds for the thread that asks and for what that starts.  Libraries start threads when they are imported: therefore
this file is also a program, which takes on rules and then becomes another.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CREATE, ADD, RESTRICT = 444, 445, 446
"""Numbers of the system calls, on every architecture."""

BITS = {1: 13, 2: 14, 3: 15}
"""How many rights over files each version of the interface knows; from version 5 there are 16."""

FILE, LIST = 0b1100_0000_0000_0111, 0b1000
"""The rights that there are over a file; and the one to see a folder's names, which is given everywhere."""

READ = 0b1101
"""To read a file or a folder, and to run a program."""

OWNERS = (0, 1, 3, 5)
"""Of root's capabilities those that it keeps: over files and processes that are there anyway.  With the others it could
make a device of the disk, or read the memory of whoever started it."""


def version() -> int:
    """Of the kernel's interface; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(CREATE, None, ctypes.c_size_t(0), 1)))


def hide(files: Sequence[Path], fixed: Sequence[Path] = ()) -> bool:
    """From now on this process, and whatever it starts, cannot read or write these files or folders.

    Args:
        files: that are as if they were not there.
        fixed: folders that can be read, but not changed.

    Returns:
        Whether the system can do that.
    """
    known, closed = version(), [path.resolve() for path in (*files, *fixed)]
    if not closed or not known:
        return not closed
    libc = ctypes.CDLL(None)
    for capability in set(range(64)).difference(OWNERS):
        libc.prctl(24, capability, 0, 0, 0)  # for the programs that it becomes
    rights = (1 << BITS.get(known, 15 if known == 4 else 16)) - 1
    ruleset = libc.syscall(CREATE, ctypes.byref(ctypes.c_uint64(rights)), ctypes.c_size_t(8), 0)
    allowed = {path: rights if path.is_dir() else rights & FILE for path in beside(closed)}
    for path, given in {Path("/"): LIST, **allowed, **dict.fromkeys(fixed, READ)}.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # it is gone, or was never to be had
        libc.syscall(ADD, ruleset, 1, ctypes.byref(_Beneath(given, place)), 0)
        os.close(place)
    done = libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(RESTRICT, ruleset, 0) == 0  # 38: no new privileges
    os.close(ruleset)
    return bool(done)


def beside(files: Sequence[Path], place: Path = Path("/")) -> Iterator[Path]:
    """The largest parts of the file system that hold none of these files, and are in none."""
    if place in files:
        return
    if not any(place in file.parents for file in files):
        yield place
        return
    try:
        inside = list(place.iterdir())
    except PermissionError:  # a folder to walk through only
        inside = [place / file.relative_to(place).parts[0] for file in files if place in file.parents]
    for path in inside:
        if not path.is_symlink():  # what it points to is allowed, or not, in its own right
            yield from beside(files, path)


class _Beneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def main() -> None:
    """`landlock.py RULES PROGRAM ARGUMENTS…`: take on rules (hidden, fixed, limits); then be that."""
    rules = json.loads(sys.argv[1])
    for which, soft, hard in rules["limits"]:
        most = resource.getrlimit(which)[1]
        resource.setrlimit(which, (soft, hard) if most < 0 else (min(soft, most), min(hard, most)))
    if not hide(*([Path(path) for path in rules[which]] for which in ("hidden", "fixed"))):
        sys.stderr.write(f"this system has no Landlock: nothing keeps this job from reading {rules['hidden']}\n")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
