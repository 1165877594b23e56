"""A real ComfyUI server for tests, and what a browser says to it over HTTP."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NODES = ROOT / "comfyui"
PROBE = Path(__file__).with_name("probe")

Graph = dict[str, dict[str, Any]]
"""A graph as ``POST /prompt`` takes it: nodes by id, each with ``class_type`` and ``inputs``."""


class Refused(Exception):
    """The server does not run a graph: its answer."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer

    def sentences(self, node: str) -> set[str]:
        """What is shown on a node."""
        return {error["details"].split(" - ", 1)[-1] for error in self.answer["node_errors"][node]["errors"]}


class Server:
    """One ComfyUI process with folders of its own. ``comfyui``: where install.sh has put it."""

    def __init__(self, comfyui: Path, base: Path, *, nodes: Path = NODES, environment: Mapping[str, str] = {}) -> None:
        self.base = base
        for name in ("custom_nodes", "models", "input", "output", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "storymem").symlink_to(nodes)
        (base / "custom_nodes" / "probe").symlink_to(PROBE)
        self.output, self.input = base / "output", base / "input"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = base / "server.log"
        options = ["--cpu", "--listen", "127.0.0.1", "--port", self.address.partition(":")[2]]
        options += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        options += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "auto"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(comfyui / "comfy" / "main.py"), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            )
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 240
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(f"the server does not answer:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error

    def queue(self, graph: Graph, client: str | None = None) -> str:
        """Queue a graph; return its id. Raises ``Refused``."""
        answer = self.post("/prompt", {"prompt": graph, "client_id": client or uuid.uuid4().hex})
        return str(answer["prompt_id"])

    def wait(self, prompt: str, seconds: float = 150) -> dict[str, Any]:
        """Return the history of a queued graph once it has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if prompt in (history := self.get(f"/history/{prompt}")):
                return dict(history[prompt])
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)
        raise AssertionError(f"no end after {seconds} s:\n{self.log.read_text()[-4000:]}")

    def run(self, graph: Graph, seconds: float = 150) -> dict[str, Any]:
        """Run a graph to its success; return its outputs by node."""
        ended = self.wait(self.queue(graph), seconds)
        assert ended["status"]["status_str"] == "success", failure(ended)
        return dict(ended["outputs"])

    def run_until(self, graph: Graph, ready: Callable[[], bool]) -> dict[str, Any]:
        """Queue a graph, interrupt it over HTTP once ``ready``, return its history."""
        prompt = self.queue(graph)
        until = time.monotonic() + 120
        while not ready():
            assert prompt not in self.get(f"/history/{prompt}"), "it ended before it could be interrupted"
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.01)
        self.post("/interrupt", {})
        return self.wait(prompt)

    def watch(self, graph: Graph) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Run a graph as a browser does; return the messages and the binary ones (previews)."""
        return asyncio.run(self._watch(graph))

    async def _watch(self, graph: Graph) -> tuple[list[dict[str, Any]], list[bytes]]:
        import aiohttp  # comes with ComfyUI

        client, texts, previews = uuid.uuid4().hex, [], []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{self.address}/ws?clientId={client}") as socket,
        ):
            prompt = await asyncio.to_thread(self.queue, graph, client)
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    previews.append(message.data)
                elif message.type == aiohttp.WSMsgType.TEXT:
                    texts.append(json.loads(message.data))
                    said = texts[-1]
                    if said["type"] == "executing" and said["data"] == {"node": None, "prompt_id": prompt}:
                        return texts, previews
        raise AssertionError("the server has closed the connection")

    def resident_mib(self) -> float:
        """Memory of the server's process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def files(self, shown: Mapping[str, Any]) -> list[Path]:
        """The files of one node's output (``images``), in order."""
        return [self.base / item["type"] / item["subfolder"] / item["filename"] for item in shown["images"]]


def failure(ended: Mapping[str, Any]) -> str:
    """Why a run failed: the message that the node shows, without the traceback."""
    for kind, facts in ended["status"]["messages"]:
        if kind == "execution_error":
            return f"{facts['node_type']}: {facts['exception_message'].strip()}"
    return str([kind for kind, _ in ended["status"]["messages"]])
