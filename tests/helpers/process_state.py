"""Everything of a process that code may change for all others in it, by name; found where possible, not listed."""

import asyncio
import atexit
import builtins
import faulthandler
import gc
import hashlib
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from omegaconf.basecontainer import BaseContainer
from PIL import Image

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CHANGES_ITSELF = (
    *("get_rng_state", "initial_seed", "seed"),  # compared as the state of the generators
    *("_get_tracing_state", "_get_cublas_handle", "_get_graph_executor_optimize", "_get_obj_in_tls"),
)


def process_state() -> dict[str, Any]:
    """The state by name. Equal states mean that nothing was left behind."""
    found: dict[str, Any] = {}
    for prefix, reader in _READERS.items():
        for name, value in reader():
            found[f"{prefix}{name}"] = value
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was: name, value before, value after."""
    names = before.keys() | after.keys()
    return {
        name: (before.get(name, "(absent)"), after.get(name, "(absent)"))
        for name in sorted(names)
        if before.get(name, "(absent)") != after.get(name, "(absent)")
    }


def _switches_of(module: Any, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What all functions without arguments of a module say whose names begin so."""
    for name in dir(module):
        if not name.startswith(prefixes) or name in _CHANGES_ITSELF:
            continue
        function = getattr(module, name)
        if not callable(function) or isinstance(function, type):
            continue
        try:
            value = function()
        except Exception as error:  # it takes arguments, or this build has no such device
            value = type(error).__name__
        if isinstance(value, _PLAIN) or type(value).__module__ == "torch._C":
            yield name, str(value)


def _backends() -> Iterator[tuple[str, Any]]:
    for module_name in sorted(name for name in sys.modules if name.startswith("torch.backends")):
        module: Any = sys.modules[module_name]
        for name in dir(module):
            if name.startswith("__"):
                continue
            try:
                value = getattr(module, name)
            except Exception as error:
                value = type(error).__name__
            if isinstance(value, _PLAIN):
                yield f"{module_name}.{name}", value


def _fp32() -> Iterator[tuple[str, Any]]:
    for backend in ("generic", "cuda", "mkldnn"):
        for operation in ("all", "matmul", "conv", "rnn"):
            if backend != "generic" or operation == "all":
                yield f"{backend}.{operation}", torch._C._get_fp32_precision_getter(backend, operation)


def _configs() -> Iterator[tuple[str, Any]]:
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if (module := sys.modules.get(name)) is not None:
            yield from ((f"{name}.{key}", repr(value)) for key, value in module.shallow_copy_dict().items())


def _loggers() -> Iterator[tuple[str, Any]]:
    known = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    for name, logger in {"root": logging.root, **known}.items():
        state = (logger.level, tuple(map(id, logger.handlers)), tuple(map(id, logger.filters)), logger.disabled)
        if state != (logging.NOTSET, (), (), False) or not logger.propagate:  # a new logger without any of it is none
            yield name, (*state, logger.propagate)
    yield "disable", logging.root.manager.disable
    yield "class", logging.getLoggerClass()


def _signals() -> Iterator[tuple[str, Any]]:
    for number in sorted(signal.valid_signals()):
        yield str(number), id(signal.getsignal(number))
    yield "timer", signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _generators() -> Iterator[tuple[str, Any]]:
    yield "torch", hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    yield "random", hash(random.getstate())
    yield "numpy", hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest()


def _hydra() -> Iterator[tuple[str, Any]]:
    yield "singletons", {kind.__name__: id(one) for kind, one in Singleton._instances.items()}
    yield "store", repr(ConfigStore.instance().repo.keys())
    yield "resolvers", sorted(BaseContainer._resolvers)
    yield "store groups", sorted(map(str, ConfigStore.instance().repo.get("hydra", {})))


def _system() -> Iterator[tuple[str, Any]]:
    names = ("excepthook", "stdout", "stderr", "stdin", "displayhook", "unraisablehook", "__stderr__")
    yield from ((name, id(getattr(sys, name))) for name in names)
    yield "path", tuple(sys.path)
    yield "argv", tuple(sys.argv)
    yield "meta_path", tuple(map(id, sys.meta_path))
    yield "recursion", sys.getrecursionlimit()
    yield "switch interval", sys.getswitchinterval()
    yield "thread hook", id(threading.excepthook)
    yield "threads", sorted(thread.name for thread in threading.enumerate())
    yield "stack size", threading.stack_size()
    yield "files", len(list(Path("/proc/self/fd").iterdir()))
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    yield "children", children.read_text() if children.exists() else ""
    yield "at exit", atexit._ncallbacks()
    yield "garbage", (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count())
    yield "locale", locale.setlocale(locale.LC_ALL)
    yield "socket timeout", socket.getdefaulttimeout()
    yield "temporary folder", tempfile.gettempdir()
    yield "loop policy", type(asyncio.get_event_loop_policy()).__name__
    yield "start method", multiprocessing.get_start_method(allow_none=True)
    yield "fault handler", faulthandler.is_enabled()
    yield "folder", str(Path.cwd())
    mask = os.umask(0)
    os.umask(mask)
    yield "umask", mask
    yield "pixels", Image.MAX_IMAGE_PIXELS
    yield "numpy errors", np.geterr()
    yield "print options", np.get_printoptions()
    yield "builtins", sorted(vars(builtins))
    yield "sharing", torch.multiprocessing.get_sharing_strategy()
    yield "priority", os.nice(0)


def _warnings() -> Iterator[tuple[str, Any]]:
    yield "filters", [repr(one) for one in warnings.filters]
    yield "show", id(warnings.showwarning)


_READERS: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "torch.": lambda: _switches_of(torch, ("get_", "is_")),
    "torch._C.": lambda: _switches_of(torch._C, ("_get_", "_is_")),
    "": _backends,
    "fp32 ": _fp32,
    "config ": _configs,
    "logger ": _loggers,
    "signal ": _signals,
    "generator ": _generators,
    "hydra ": _hydra,
    "environment ": lambda: iter(os.environ.items()),
    "system ": _system,
    "warnings ": _warnings,
}
