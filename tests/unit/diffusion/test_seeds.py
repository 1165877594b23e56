"""The seed of a shot and its initial noise."""

import pytest
import torch

from storymem_dist.diffusion.seeds import initial_noise, shot_seed
from storymem_dist.errors import ConfigError
from storymem_dist.story.schema import Scene, Shot, Story
from tests.helpers.golden import load_golden


def two_scenes(seed: int | None = None) -> Story:
    def shot(index: int, index_in_scene: int, scene_num: int) -> Shot:
        return Shot(index=index, index_in_scene=index_in_scene, scene_num=scene_num, prompt="p", cut=True)

    scenes = (
        Scene(scene_num=1, shots=(shot(0, 0, 1), shot(1, 1, 1))),
        Scene(scene_num=2, shots=(shot(2, 0, 2), shot(3, 1, 2))),
    )
    return Story(story_id="s", name="s", overview="", scenes=scenes, seed=seed)


@pytest.mark.parametrize(
    ("rule", "story_seed", "seeds"),
    [
        ("index_in_scene", None, [7, 8, 7, 8]),
        ("per_shot", None, [7, 8, 9, 10]),
        ("index_in_scene", 100, [100, 101, 100, 101]),
        ("per_shot", 0, [0, 1, 2, 3]),
    ],
)
def test_a_shots_seed_is_its_storys_or_the_jobs_plus_its_index(
    rule: str, story_seed: int | None, seeds: list[int]
) -> None:
    story = two_scenes(story_seed)
    assert [shot_seed(7, shot, story, rule) for shot in story.shots] == seeds


@pytest.mark.parametrize(("job_seed", "story_seed", "message"), [(-1, None, "sampler.seed=-1"), (3, -2, "story s=-2")])
def test_a_negative_seed_must_have_been_drawn_before(job_seed: int, story_seed: int | None, message: str) -> None:
    story = two_scenes(story_seed)
    with pytest.raises(ConfigError, match=message):
        shot_seed(job_seed, story.shots[0], story, "per_shot")


def test_noise_is_the_originals_in_one_draw() -> None:
    tensors, manifest = load_golden("end_to_end")
    for run in manifest["runs"]:
        expected = tensors[f"run.{run['id']}.noise"]
        assert torch.equal(initial_noise(run["seed"], expected.shape), expected)


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initial_noise(5, (16, 3, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_noise_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.noise_device=cuda needs a CUDA device"):
        initial_noise(0, (16, 1, 2, 2), "cuda")


@pytest.mark.gpu
def test_cuda_noise_is_drawn_on_the_device_and_repeats() -> None:
    first, second = (initial_noise(5, (16, 3, 2, 2), "cuda") for _ in range(2))
    assert first.is_cuda
    assert torch.equal(first, second)
    assert not torch.equal(first.cpu(), initial_noise(5, (16, 3, 2, 2), "cpu"))
