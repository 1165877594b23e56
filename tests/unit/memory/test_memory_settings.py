"""Memory settings reject values that cannot work, naming the key."""

import pytest

from storymem_dist.errors import ConfigError
from storymem_dist.memory.settings import MemorySettings


def test_the_defaults_are_storymem_s_but_for_the_quality_test_which_needs_no_weights() -> None:
    settings = MemorySettings()
    assert (settings.max_keyframes, settings.num_fixed, settings.max_per_shot) == (10, 3, 3)
    assert (settings.similarity, settings.similarity_threshold, settings.threshold_step) == ("clip", 0.9, 0.01)
    assert (settings.quality, settings.quality_threshold) == ("sharpness", None)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("max_keyframes", -1, "it must be between 0 and 1000"),
        ("num_fixed", -1, "it must be between 0 and 1000"),
        ("num_fixed", 11, "it must be at most memory.max_keyframes=10"),
        ("max_per_shot", 0, "it must be between 1 and 1000"),
        ("similarity", "cosine", "use one of: clip, hsv"),
        ("similarity_threshold", 0.0, "it must be above 0 and at most 1"),
        ("similarity_threshold", float("nan"), "it must be above 0 and at most 1"),
        ("threshold_step", 0.0, "it must be between 0.001 and 1.0"),
        ("quality", "aesthetic", "use one of: hpsv3, sharpness, none"),
        ("quality_threshold", float("nan"), "it must be between -1000000.0 and 1000000.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MemorySettings(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"memory.{key}={value!r} is not allowed; {allowed}"
