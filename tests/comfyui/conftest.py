"""The server that all tests here share. Without ``STORYMEM_COMFYUI`` (see install.sh) nothing here is collected."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui.client import Server

COMFYUI = os.environ.get("STORYMEM_COMFYUI")

collect_ignore_glob = [] if COMFYUI else ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert COMFYUI is not None
    running = Server(Path(COMFYUI), tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()
