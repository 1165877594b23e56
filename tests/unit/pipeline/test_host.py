"""The process of another program is left as it was found, and its state changes no pixel."""

import asyncio
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from torch.nn import attention

from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.pipeline import (
    Interrupted,
    StoryMemory,
    check_models,
    check_story,
    open_models,
    render_shot,
    render_story,
)
from storymem_dist.pipeline.host import as_guest, choose_guest_device
from tests.helpers.host_programs import OVERRIDES, storyboard
from tests.helpers.process_state import differences, process_state

SHORT = ("sampler.num_inference_steps=2", "sampler.num_frames=5")


def use_everything(folder: Path) -> torch.Tensor:
    """Call what a host calls: what works, what is refused, and what is interrupted; return the frames of a shot."""
    models = open_models("tiny", device="cpu", overrides=(*OVERRIDES, *SHORT))
    for wrong in (
        lambda: check_models("/no/such/folder"),
        lambda: check_story("scenes: [", models),
        lambda: open_models("tiny", overrides=("sampler.num_frames=10",)),
        lambda: render_shot(models, "a fox", mode="mm2v"),
        lambda: render_shot(models, "a fox", should_stop=lambda: True),
        lambda: render_shot(models, "a fox", loras=["no/such/file.safetensors"]),
    ):
        with pytest.raises(StoryMemError):
            wrong()
    shot = render_shot(models, "a fox")
    memory = shot.memory.remember(shot.images()).memory.with_references(shot.last_frame)
    text, asked = storyboard(((True,),)), []
    with suppress(Interrupted):
        render_story(models, text, folder / "run", should_stop=lambda: asked.append(0) or len(asked) > 3)
    output = render_story(models, text, folder / "run", memory=memory, overrides=("debug.deterministic=true",))
    assert output.num_rendered == 1 and isinstance(output.memory, StoryMemory)
    models.unload()
    return shot.frames


@contextmanager
def a_host_with_its_own_ideas(folder: Path) -> Iterator[None]:
    """Everything that the API needs otherwise is set otherwise."""
    cudnn, handler = torch.backends.cudnn, logging.NullHandler()
    before = (torch.get_default_dtype(), torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32)
    threads, where, level = torch.get_num_threads(), Path.cwd(), logging.root.level
    old_signal = signal.signal(signal.SIGUSR1, lambda *_: None)
    hydra = initialize_config_dir(version_base="1.3", config_dir=str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="of the host")
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.DEBUG)
        logging.getLogger("storymem_dist").setLevel(logging.ERROR)
        os.environ["CUDNN_CONV_WSCAP_DBG"] = "17"
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_flash_sdp(False)
        cudnn.benchmark, cudnn.allow_tf32 = True, False
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(where)
            torch.set_default_dtype(before[0])
            torch.set_float32_matmul_precision(before[1])
            cudnn.benchmark, cudnn.allow_tf32 = before[2], before[3]
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            torch.backends.cuda.enable_flash_sdp(True)
            logging.getLogger("storymem_dist").setLevel(logging.NOTSET)
            logging.root.setLevel(level)
            logging.root.removeHandler(handler)
            signal.signal(signal.SIGUSR1, old_signal)
            hydra.__exit__(None, None, None)


def test_a_host_is_left_as_it_was_found_and_its_state_changes_no_pixel(tmp_path: Path) -> None:
    models = open_models("tiny", device="cpu", overrides=(*OVERRIDES, *SHORT))
    calm = render_shot(models, "a fox").frames
    models.unload()
    found: dict[str, object] = {}

    def work() -> None:
        try:
            in_a_worker_thread()
        except BaseException as error:
            found["error"] = error

    def in_a_worker_thread() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            before = process_state()
            found["frames"] = use_everything(tmp_path)
            found["thread"] = differences(before, process_state())

    async def serve() -> None:
        before = process_state()
        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            await asyncio.sleep(0.05)
        found["process"] = differences(before, process_state())

    with a_host_with_its_own_ideas(tmp_path):
        asyncio.run(serve())
    if "error" in found:
        raise found["error"]  # type: ignore[misc]
    assert found["thread"] == {}
    assert found["process"] == {}
    assert torch.equal(found["frames"], calm)  # type: ignore[arg-type]


def test_the_state_that_is_compared_includes_what_renders_set() -> None:
    before = process_state()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    os.environ["SOMETHING_NEW"] = "1"
    logging.getLogger("storymem_dist").addHandler(handler := logging.NullHandler())
    try:
        changed = differences(before, process_state())
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        del os.environ["SOMETHING_NEW"]
        logging.getLogger("storymem_dist").removeHandler(handler)
    assert {"torch.get_float32_matmul_precision", "fp32 cuda.matmul", "environment SOMETHING_NEW"} <= changed.keys()
    assert "logger storymem_dist" in changed and any("benchmark" in name for name in changed)


class FakeGpus:
    """Two GPUs of which the host uses the second one, and what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[torch.device] = []
        self.left = 0
        answers = {"is_available": True, "device_count": 2, "current_device": 1}
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.entered.append(device)
        yield
        self.left += 1


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_the_gpu_that_the_host_uses_is_used_and_is_current_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, threads = FakeGpus(monkeypatch), torch.get_num_threads()
    for name, index in (("auto", 1), ("cuda", 1), ("cuda:0", 0), (torch.device("cuda", 1), 1)):
        assert choose_guest_device(name) == torch.device("cuda", index)
    with pytest.raises(ConfigError, match="device=cuda:2, but torch sees 2 GPUs here, cuda:0 to cuda:1"):
        choose_guest_device("cuda:2")
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "17")
    before = process_state()
    with as_guest(torch.device("cuda", 0), cpu_threads=threads + 3, vae_precision="float32"):
        assert gpus.entered == [torch.device("cuda", 0)] and gpus.left == 0
        assert torch._C._get_fp32_precision_getter("cuda", "conv") != "tf32"
        assert torch.get_num_threads() == threads, "the host's threads are its own where a GPU computes"
    assert gpus.left == 1 and differences(before, process_state()) == {}


@pytest.mark.parametrize("of_the_host", [None, "FA3"])
def test_the_flash_attention_of_the_host_comes_back(monkeypatch: pytest.MonkeyPatch, of_the_host: str | None) -> None:
    current = [of_the_host]
    functions = {
        "current_flash_attention_impl": lambda: current[0],
        "restore_flash_attention_impl": lambda: current.__setitem__(0, None),
        "activate_flash_attention_impl": lambda name: current.__setitem__(0, name),
    }
    for name, function in functions.items():
        monkeypatch.setattr(attention, name, function, raising=False)
    with as_guest(torch.device("cpu"), cpu_threads=1, vae_precision="tf32"):
        current[0] = "FA4"
    assert current == [of_the_host]
