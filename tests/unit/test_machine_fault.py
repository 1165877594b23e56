"""Which errors are faults of the machine, whatever library raises them."""

import errno
import os
import pickle
from pathlib import Path

import av
import pytest
import torch
from safetensors import SafetensorError

from storymem_dist.errors import CheckpointError, MachineError, RunFolderError, ShotError
from storymem_dist.hardware import machine_fault

FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/night/clip.mp4")


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


def while_handling(error: Exception, other: Exception) -> Exception:
    error.__context__ = other
    error.__suppress_context__ = True  # ``raise ... from None``
    return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        av.error.OSError(errno.ENOSPC, "No space left on device", "clip.mp4"),
        av.FFmpegError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        caused(RuntimeError("[enforce fail at inline_container]"), RuntimeError("basic_ios::clear: iostream error")),
        caused(RunFolderError("story.mp4 cannot be written"), FULL),
        while_handling(ShotError("keyframes cannot be kept"), FULL),
        caused(RuntimeError("a"), caused(ValueError("b"), OSError(errno.EROFS, "Read-only file system"))),
        *(OSError(number, os.strerror(number)) for number in (errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.EFBIG)),
    ],
    ids=repr,
)
def test_a_full_or_broken_disk_is_found_behind_every_library(error: Exception) -> None:
    fault = machine_fault(error)
    assert isinstance(fault, MachineError) and fault.exit_code == 5
    assert "give the same command again" in str(fault)
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "reference.png"),
        PermissionError(errno.EACCES, "Permission denied", "reference.png"),
        ShotError("the prompt says: No space left on device"),
        CheckpointError("truncated"),
        RuntimeError("device-side assert"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_none(error: BaseException) -> None:
    assert machine_fault(error) is None


def test_while_writing_a_lost_permission_or_folder_is_one_too_and_a_bad_argument_is_not() -> None:
    lost = PermissionError(errno.EACCES, "Permission denied", "/runs/night/x")
    assert "/runs/night/x: Permission denied; make it writable again" in str(machine_fault(lost, while_writing=True))
    assert machine_fault(FileNotFoundError(errno.ENOENT, "gone", "/runs"), while_writing=True) is not None
    assert machine_fault(OSError(errno.EINVAL, "Invalid argument"), while_writing=True) is None
    assert machine_fault(av.FFmpegError(1094995529, "Invalid data"), while_writing=True) is None


def test_the_message_names_the_file_and_the_cure() -> None:
    assert str(machine_fault(FULL)) == (
        "/runs/night/clip.mp4: No space left on device; free space there, then give the same command again "
        "(no shot is marked as failed)"
    )
    assert "ulimit -n" in str(machine_fault(OSError(errno.EMFILE, "Too many open files", str(Path("x")))))
