import json

import pytest

from storymem_dist.config.composing import to_plain
from storymem_dist.config.points import can_join, points_from_plain, points_to_plain
from storymem_dist.errors import ConfigError
from tests.helpers.small_job import small_point, small_settings


def test_points_travel_to_another_process_unchanged() -> None:
    point = small_point("sampler.seed=7", "model.loras=[{path: a.safetensors}]", name="seed=7")
    points, sweep = points_from_plain(json.loads(json.dumps(points_to_plain([point], "seeds"))))
    assert sweep == "seeds"
    assert points[0].settings == point.settings and points[0].name == "seed=7"
    assert to_plain(points[0].settings) == to_plain(point.settings)


def test_points_are_validated_again_where_they_arrive() -> None:
    plain = json.loads(json.dumps(points_to_plain([small_point()], None)))
    plain["points"][0]["config"]["sampler"]["num_frames"] = 18
    with pytest.raises(ConfigError, match=r"sampler\.num_frames=18 is not allowed"):
        points_from_plain(plain)


@pytest.mark.parametrize(
    ("override", "joins"),
    [
        ("output=elsewhere", True),
        ("sampler.seed=5", True),
        ("memory.max_keyframes=4", True),
        ("stories.path=a.json", True),
        ("tracking.report=true", True),
        ("sampler.continuation=mm2v", False),
        ("model.dtype=bfloat16", False),
        ("parallel=fsdp_2gpu", False),
        ("dispatch.poll_seconds=9", False),
        ("debug=verbose", False),
    ],
)
def test_two_points_join_where_they_share_weights_layout_and_way_of_working(override: str, joins: bool) -> None:
    assert can_join(small_settings(), small_settings(override)) is joins
