"""A node for tests: what a well-behaved pack leaves as it was in the server's process, as JSON."""

import gc
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import warnings

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io


class Probe(io.ComfyNode):
    """Runs every time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Probe", category="tests", inputs=[io.Int.Input("number")], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, number: int) -> io.NodeOutput:
        gc.collect()
        from hydra.core.global_hydra import GlobalHydra

        from storymem_dist import loaded_models

        root = logging.getLogger()
        state = {
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109
            "arguments": sys.argv,
            "hooks": [repr(sys.excepthook), repr(threading.excepthook)],
            "logging": [root.level, [repr(handler) for handler in root.handlers], logging.root.manager.disable],
            "warnings": len(warnings.filters),
            "signals": {
                name.name: repr(signal.getsignal(name)) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            },
            "hydra": GlobalHydra.instance().is_initialized(),
            "distributed": torch.distributed.is_initialized(),
            "threads": torch.get_num_threads(),
            "dtype": str(torch.get_default_dtype()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
            "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
            "inference": torch.is_inference_mode_enabled(),
            "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        }
        found = {
            "state": state,
            "loaded": [models.name for models in loaded_models()],
            "books": sum(
                type(one.model).__name__ == "_Weights" for one in comfy.model_management.current_loaded_models
            ),
        }
        return io.NodeOutput(ui={"text": (json.dumps(found),)})


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Probe]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls."""
    return _Extension()
