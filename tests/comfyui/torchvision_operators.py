"""For an environment with a torch for CPUs: lets torchvision be imported, whose compiled part is made for CUDA.

install.sh puts this module into the environment with a line that imports it at every start. Two operators get a schema
when torchvision is looked for; nothing that needs them runs in the tests.
"""

import sys
from collections.abc import Sequence


class _Before:
    """Finds nothing; is asked for every module that is imported."""

    operators = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import torch

            _Before.operators = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _Before.operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Before())  # type: ignore[arg-type]
