"""``storymem-plan calibrate`` on two ranks measures the link between them; the first one keeps and prints it."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from storymem_dist.cli.plan import main
from storymem_dist.planner.calibration import MEASURED, load_constants, load_shipped
from storymem_dist.planner.hardware import hardware_here
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def calibrate_on_ranks() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        main(["calibrate"])
    assert not ended.value.code
    return printed.getvalue()


def test_ranks_measure_their_links_together(tmp_path: Path) -> None:
    first, second = run_ranks(calibrate_on_ranks, 2, env={"STORYMEM_CACHE": str(tmp_path)})
    assert first.startswith("constants of cpu: measured here: storymem-plan calibrate") and second == ""
    here = hardware_here(CPU)
    found = load_constants(here, cache=tmp_path)
    assert found.how == MEASURED and found.link != load_shipped(here).link and 0 < found.link < 1000
