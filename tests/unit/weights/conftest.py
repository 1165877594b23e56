"""One tiny checkpoint for all tests here; those that damage it copy it first."""

import shutil
from pathlib import Path

import pytest

from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    """Read only."""
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", seed=0)


@pytest.fixture
def i2v_copy(tiny: ModelFolders, tmp_path: Path) -> Path:
    """A native I2V checkpoint that a test may damage."""
    return shutil.copytree(tiny.i2v_dir, tmp_path / "i2v")
