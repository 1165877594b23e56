"""A published file that lies on no hub: the same download, with the hash of the first one."""

from pathlib import Path

import huggingface_hub
import pytest

from storymem_dist.cli import weights as weights_cli
from storymem_dist.cli.weights import Published, main, published_weights
from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.weights.hub import download, plan_download, read_state
from storymem_dist.weights.web_file import WebFiles
from tests.helpers.hub_server import FakeHub, serve

HEAD = "sa_0_4_vit_l_14_linear.pth"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def source(fake: FakeHub, *names: str) -> WebFiles:
    return WebFiles(fake.endpoint + "/{repo}/resolve/{revision}/{path}", names or (HEAD,))


def test_the_command_fetches_it_next_to_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(FakeHub("LAION-AI/aesthetic-predictor", {HEAD: b"head" * 900})) as fake:
        entry = Published(
            repo="LAION-AI/aesthetic-predictor",
            revision="main",
            folder="aesthetic-predictor",
            num_bytes=4000,
            purpose="a test",
            files=[HEAD],
            address=fake.endpoint + "/{repo}/resolve/{revision}/{path}",
        )
        monkeypatch.setattr(weights_cli, "published_weights", lambda: {"aesthetic": entry})
        main(["download", "aesthetic", "--to", str(tmp_path)])
    assert "aesthetic: complete and checked in" in capsys.readouterr().out
    assert (tmp_path / "aesthetic-predictor" / HEAD).read_bytes() == b"head" * 900


def test_another_file_at_the_same_address_is_refused_later(tmp_path: Path) -> None:
    fake = FakeHub("a/b", {HEAD: b"first"})
    with serve(fake):
        root, files = tmp_path / "head", source(fake)
        download(files, plan_download(files, "a/b", "main", root))
        state = read_state(root)
        assert state is not None and state.files[0].sha256 and state.files[0].num_bytes == 5
        assert plan_download(files, "a/b", "main", root).files == (), "nothing is left"
        (root / HEAD).unlink()
        fake.files[HEAD] = b"other"
        with pytest.raises(CheckpointError, match="arrived with the wrong content"):
            download(files, plan_download(files, "a/b", "main", root))


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(FakeHub("a/b", {HEAD: b"first"})) as fake:
        with pytest.raises(WeightsNotFound, match=r"none\.pth cannot be read"):
            source(fake, "none.pth").list_files("a/b", "main")
        monkeypatch.setattr("storymem_dist.weights.web_file.MAX_BYTES", 3)
        with pytest.raises(WeightsNotFound, match="larger than 3 bytes"):
            source(fake).list_files("a/b", "main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFound, match="HF_HUB_OFFLINE is set"):
        source(fake).list_files("a/b", "main")


def test_the_weights_of_scores_are_published_with_their_sizes() -> None:
    from storymem_dist.evaluation.settings import EvaluationSettings

    published, settings = published_weights(), EvaluationSettings()
    for name, folder in (
        ("viclip", settings.viclip),
        ("clip_l", settings.clip_l),
        ("aesthetic", settings.aesthetic),
    ):
        assert folder == f"weights/{published[name].folder}" and published[name].num_bytes
    assert published["aesthetic"].files == [HEAD]
