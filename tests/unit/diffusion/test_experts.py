"""The pair of experts: which one runs, its guidance scale, and the calls that a residency receives."""

import pytest

from storymem_dist.diffusion.experts import AllResident, ExpertPair
from tests.helpers.fake_experts import FakeExpert, fake_experts


@pytest.mark.parametrize(
    ("timestep", "name"), [(999, "high_noise"), (900, "high_noise"), (899, "low_noise"), (0, "low_noise")]
)
def test_the_high_noise_expert_works_at_and_above_the_boundary(timestep: int, name: str) -> None:
    pair = fake_experts()
    assert pair.name_at(timestep) == name
    assert pair.select(timestep).name == name


def test_each_expert_has_its_own_guidance_scale() -> None:
    high, low = FakeExpert(1.0), FakeExpert(2.0)
    pair = ExpertPair(
        high_noise=high, low_noise=low, boundary_ratio=0.875, guidance_scale_high=4.0, guidance_scale_low=3.0
    )
    assert (pair.select(875).module, pair.select(875).guidance_scale) == (high, 4.0)
    assert (pair.select(874).module, pair.select(874).guidance_scale) == (low, 3.0)


def test_a_residency_learns_every_choice_and_of_the_end() -> None:
    class Recorder(AllResident):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def activate(self, name: str) -> None:
            self.calls.append(name)

        def release(self) -> None:
            self.calls.append("release")

    recorder = Recorder()
    pair = fake_experts(recorder)
    for timestep in (999, 950, 500):
        pair.select(timestep)
    pair.release()
    assert recorder.calls == ["high_noise", "high_noise", "low_noise", "release"]
    with pytest.raises(RuntimeError, match="the low_noise expert was released"):
        pair.select(3)
