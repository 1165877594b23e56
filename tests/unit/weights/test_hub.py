"""Downloads from a hub on this machine: complete, resumed, and refused with the reason."""

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from storymem_dist.errors import CheckpointError, ConfigError, WeightsNotFound
from storymem_dist.weights.hub import DownloadPlan, Hub, check_space, download, plan_download, read_state, verify_hashes
from tests.helpers.hub_server import COMMIT, FakeHub, serve

REPO = "Wan-AI/Tiny"
BIG = "high_noise_model/part-1.safetensors"
FILES = {
    BIG: bytes(range(256)) * 2000,
    "low_noise_model/part-1.safetensors": b"low" * 5000,
    "config.json": b'{"dim": 1}',
}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    # the hub's client saves received bytes only in whole chunks: 10 MB normally, small ones here
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with serve(FakeHub(REPO, dict(FILES))) as hub:
        yield hub


def plan(fake: FakeHub, root: Path, **options: object) -> DownloadPlan:
    return plan_download(Hub(fake.endpoint), REPO, "main", root, **options)


def fetch(fake: FakeHub, root: Path, **options: object) -> DownloadPlan:
    planned = plan(fake, root, **options)
    download(Hub(fake.endpoint), planned)
    return planned


def test_a_download_brings_every_file_and_counts_its_bytes(fake: FakeHub, tmp_path: Path) -> None:
    counted: list[int] = []
    planned = plan(fake, tmp_path / "w")
    download(Hub(fake.endpoint), planned, on_bytes=counted.append)
    assert {name: (tmp_path / "w" / name).read_bytes() for name in FILES} == FILES
    assert sum(counted) == planned.num_bytes_to_fetch == sum(map(len, FILES.values()))
    assert not (tmp_path / "w" / ".storymem_partial").exists()
    state = read_state(tmp_path / "w")
    assert state is not None
    assert (state.repo, state.commit) == (REPO, COMMIT)
    assert verify_hashes(tmp_path / "w", state) == []


def test_a_second_download_moves_nothing(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path)
    fake.requests.clear()
    assert plan(fake, tmp_path).files == ()
    assert fetch(fake, tmp_path).num_bytes_to_fetch == 0
    assert fake.requests == []


def test_a_connection_that_is_cut_goes_on_where_it_was(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after[BIG] = [100_000, 150_000]
    fetch(fake, tmp_path)
    assert (tmp_path / BIG).read_bytes() == FILES[BIG]
    assert fake.gets_of(BIG) == [None, "bytes=100000-", "bytes=250000-"]


def test_a_later_process_goes_on_where_an_earlier_one_gave_up(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after[BIG] = [300_000] + [0] * 50
    with pytest.raises(WeightsNotFound, match="What was fetched is kept: the same command continues"):
        fetch(fake, tmp_path)
    assert not (tmp_path / BIG).exists()
    fake.cut_after.clear()
    fake.requests.clear()
    planned = fetch(fake, tmp_path)
    assert planned.num_bytes_to_fetch <= len(FILES[BIG]) - 300_000 + len(FILES["low_noise_model/part-1.safetensors"])
    assert fake.gets_of(BIG) == ["bytes=300000-"]
    assert (tmp_path / BIG).read_bytes() == FILES[BIG]


def test_a_download_that_goes_on_stays_with_its_commit(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path, only=["config.json"])
    fake.requests.clear()
    fetch(fake, tmp_path)
    assert not [path for _, path, _ in fake.requests if "/api/" in path]
    assert all(COMMIT in path for _, path, _ in fake.requests)


def test_files_that_are_there_already_are_checked_and_kept(fake: FakeHub, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_bytes(b'{"dim": 2}')
    fetch(fake, tmp_path)
    assert [path for method, path, _ in fake.requests if method == "GET" and "/resolve/" in path] == [
        f"/{REPO}/resolve/{COMMIT}/config.json"
    ]
    assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]


def test_only_the_files_asked_for_are_fetched(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path, only=["*.json", "low_noise_model/*"])
    assert not (tmp_path / BIG).exists()
    assert (tmp_path / "config.json").exists()
    state = read_state(tmp_path)
    assert state is not None
    assert verify_hashes(tmp_path, state) == [BIG]


def test_a_pattern_that_matches_nothing_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only \*\.gguf: no file of Wan-AI/Tiny matches; it holds: config\.json, "):
        plan(fake, tmp_path, only=["*.gguf"])


@pytest.mark.parametrize("name", [BIG, "config.json"])
def test_a_file_with_the_wrong_content_is_removed(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.corrupt.add(name)
    with pytest.raises(CheckpointError) as caught:
        fetch(fake, tmp_path)
    assert f"{name}: arrived with the wrong content" in str(caught.value)
    assert not (tmp_path / name).exists()
    fake.corrupt.clear()
    fetch(fake, tmp_path)
    assert (tmp_path / name).read_bytes() == FILES[name]


def test_a_file_that_changes_later_is_found_by_verify(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path)
    content = bytearray(FILES[BIG])
    content[77] ^= 1
    (tmp_path / BIG).write_bytes(content)
    state = read_state(tmp_path)
    assert state is not None
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors: not the published file"):
        verify_hashes(tmp_path, state)
    fetch(fake, tmp_path)
    assert (tmp_path / BIG).read_bytes() == FILES[BIG]


def test_too_small_a_disk_is_noticed_before_anything_is_fetched(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    planned = plan(fake, tmp_path / "deep" / "folder")
    with pytest.raises(WeightsNotFound, match=r"0\.0 GB are free on this disk; make room, or choose another folder"):
        check_space(planned)
    with pytest.raises(WeightsNotFound, match="GB are needed"):
        download(Hub(fake.endpoint), planned)
    assert not [path for _, path, _ in fake.requests if "/resolve/" in path]


def test_a_disk_that_fills_up_meanwhile_is_named(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("storymem_dist.weights.hub.http_get", full)
    with pytest.raises(WeightsNotFound, match="no space left on the disk; what was fetched is kept"):
        fetch(fake, tmp_path)


def test_a_file_that_is_listed_but_gone_is_named(fake: FakeHub, tmp_path: Path) -> None:
    fake.vanished.add(BIG)
    with pytest.raises(WeightsNotFound, match=rf"{BIG}: listed, but not on the server"):
        fetch(fake, tmp_path)


def test_a_licence_that_must_be_accepted_is_explained(fake: FakeHub, tmp_path: Path) -> None:
    fake.gated = True
    with pytest.raises(WeightsNotFound) as caught:
        plan(fake, tmp_path)
    assert f"open {fake.endpoint}/{REPO} in a browser, accept it, then log in here with `hf auth login`" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("Wan-AI/Nothing", "main", "Wan-AI/Nothing: not found at http://127.0.0.1"),
        (REPO, "v9", "Wan-AI/Tiny: there is no revision 'v9' at http://127.0.0.1"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    fake: FakeHub, tmp_path: Path, repo: str, revision: str, message: str
) -> None:
    with pytest.raises(WeightsNotFound) as caught:
        plan_download(Hub(fake.endpoint), repo, revision, tmp_path)
    assert message in str(caught.value)


def test_no_network_is_explained(tmp_path: Path) -> None:
    with serve(FakeHub(REPO, FILES)) as gone:
        pass
    with pytest.raises(WeightsNotFound) as caught:
        plan(gone, tmp_path)
    assert f"{gone.endpoint} cannot be reached, or the connection broke" in str(caught.value)
    assert "give a mirror with --endpoint" in str(caught.value)


def test_offline_mode_is_explained(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFound, match="HF_HUB_OFFLINE is set; unset it to download"):
        plan(fake, tmp_path)


def test_a_mirror_that_holds_too_little_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"lists 527,010 bytes, expected about 126,201,624,837"):
        plan(fake, tmp_path, expected_bytes=126_201_624_837)


def test_a_folder_of_another_repository_is_left_alone(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path)
    with pytest.raises(
        ConfigError, match="holds a download of Wan-AI/Tiny; give another folder for Kevin-thu/StoryMem"
    ):
        plan_download(Hub(fake.endpoint), "Kevin-thu/StoryMem", "main", tmp_path)


def test_a_damaged_note_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "storymem_download.json").write_text(json.dumps({"repo": REPO}))
    with pytest.raises(CheckpointError, match=r"storymem_download\.json: damaged"):
        plan(fake, tmp_path)
