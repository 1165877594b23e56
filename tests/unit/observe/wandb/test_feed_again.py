"""A run that was fed to Weights & Biases is fed again as it was, so that its summary has the scores; others are not."""

from pathlib import Path
from unittest.mock import patch

import pytest

from storymem_dist.errors import RunFolderError
from storymem_dist.observe.wandb import process
from storymem_dist.observe.wandb.folder import Progress, save_progress
from storymem_dist.observe.wandb.process import feed_again
from tests.helpers.fake_run import FakeRun


def test_it_is_fed_in_the_mode_it_was_fed_in(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1)
    with patch.object(process, "feed", return_value="fed") as feed:
        assert feed_again(run.root) == "" and not feed.called, "it never was"
        save_progress(run.root, Progress(target=["offline", "", "", "storymem"]))
        assert feed_again(run.root) == "fed"
        assert feed.call_args.args[1].mode == "offline" and not feed.call_args.kwargs["by_hand"]
        assert feed.call_args.kwargs["should_finish"].is_set()
        assert feed_again(run.root, "off") == "" and feed.call_count == 1
        assert feed_again(run.root, "online") == "fed" and feed.call_args.args[1].mode == "online"
    with (
        patch.object(process, "feed", side_effect=OSError("no space")),
        pytest.raises(RunFolderError, match="no space"),
    ):
        feed_again(run.root)
