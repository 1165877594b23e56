from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from storymem_dist.config.composing import register_schema, to_plain, to_settings
from storymem_dist.config.overrides import point_stories_at_paths
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError
from storymem_dist.resources import config_folder

CONF = config_folder()
GROUPS = ("model", "sampler", "memory", "stories", "parallel", "tracking", "debug", "launch", "evaluation")


def compose_settings(*overrides: str) -> RenderConfig:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_settings(compose("render", overrides=list(overrides)))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in choices(group)])
def test_every_entry_of_every_group_composes(choice: str) -> None:
    compose_settings(choice)


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name: str) -> None:
    compose_settings(f"experiment={name}")


def test_groups_say_everything_that_the_schema_knows() -> None:
    """The published entry of a group lists every key, so that the file is its own documentation."""
    for group, name in (("model", "wan22_a14b"), ("memory", "storymem"), ("stories", "none")):
        written = set(OmegaConf.load(CONF / group / f"{name}.yaml"))
        known = set(to_plain(RenderConfig())[group])
        assert known - written <= {"generate", "generate_seed", "packed", "packed_sha256"}, (group, known - written)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampler.stepz=3", "sampler.stepz"),
        ("sampler.num_inference_steps=many", "sampler.num_inference_steps"),
        ("memory.max_keyframes=[1]", "memory.max_keyframes"),
        ("outputt=x", "outputt"),
        ("tracking.wandb.tags=3", "tracking.wandb.tags"),
    ],
)
def test_unknown_and_ill_typed_keys_are_refused_with_their_path(override: str, said: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose_settings(override)
    message = f"{caught.value} {caught.value.__cause__}"
    assert said in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.num_frames=18", "sampler.num_frames=18 is not allowed"),
        ("sampler.solver=ddim", "sampler.solver='ddim' is not allowed; use one of: unipc"),
        ("model.dtype=fp16", "model.dtype='fp16' is not allowed; use one of: bfloat16, float32"),
        ("model.linears=fp8", "model.linears='fp8' is not allowed; use one of: exact, float8, float8_fast, int8"),
        ("memory.num_fixed=11", "memory.num_fixed=11 is not allowed"),
        ("parallel.cfg=3", "parallel.cfg=3 is not allowed"),
        ("stories.max_shots=0", "stories.max_shots=0 is not allowed"),
        ("video.crf=99", "video.crf=99 is not allowed"),
        ("debug.log_level=loud", "debug.log_level='loud' is not allowed; use one of: debug, info, warning, error"),
        ("model.loras=[{path: a, scale_rule: x}]", "model.loras.scale_rule='x' is not allowed"),
    ],
)
def test_values_that_are_not_allowed_name_the_key_and_what_is(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings(override)
    assert message in str(caught.value)


def test_debug_verbose_makes_the_console_verbose_unless_it_is_set() -> None:
    verbose = compose_settings("debug=verbose")
    assert verbose.tracking.console.level == "verbose"
    debug = verbose.debug
    assert (debug.deterministic, debug.verify_checksums, debug.log_level) == (True, True, "debug")
    assert compose_settings("debug=verbose", "tracking.console.level=quiet").tracking.console.level == "quiet"
    assert compose_settings("debug=verbose", "tracking=none").tracking.console.mode == "off"


def test_an_unknown_entry_of_a_group_is_refused() -> None:
    with pytest.raises(MissingConfigException, match="sampler/nothing"):
        compose_settings("sampler=nothing")


def test_settings_survive_the_way_through_plain_values() -> None:
    settings = compose_settings("experiment=demo", "sampler.seed=7")
    assert to_plain(settings)["sampler"]["seed"] == 7
    assert settings.model.packed is not None and settings.memory.similarity == "hsv"


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("stories=examples", "stories=examples"),
        ("stories=none", "stories=none"),
        ("stories=a/b.json", "stories.path='a/b.json'"),
        ("stories=a/*.json", "stories.path='a/*.json'"),
        ("stories=it's.json", "stories.path='it\\'s.json'"),
        ("stories=[a.json,b.yaml]", "stories.path=[a.json,b.yaml]"),
        ("stories=examples,none", "stories=examples,none"),
        ("stories.path=x", "stories.path=x"),
        ("output=stories=x", "output=stories=x"),
    ],
)
def test_stories_takes_a_path_as_well_as_an_entry(given: str, becomes: str) -> None:
    assert point_stories_at_paths(["model=tiny", given]) == ["model=tiny", becomes]


def test_a_path_with_blanks_and_quotes_reaches_the_settings_as_it_is() -> None:
    path = "my stories/it's (1) [draft].json"
    [override] = point_stories_at_paths([f"stories={path}"])
    assert compose_settings(override).stories.paths() == [path]


@pytest.mark.parametrize("path", ["null", "[]", "3", "['']"])
def test_no_storyboard_is_reported_with_an_example(path: str) -> None:
    with pytest.raises(ConfigError, match="give a storyboard file, a folder or a glob, for example"):
        compose_settings(f"stories.path={path}").stories.paths()


def test_the_configuration_lies_in_the_checkout_or_in_the_package() -> None:
    assert (CONF / "render.yaml").is_file()
    root = Path(__file__).parents[3]
    assert CONF in (root / "conf", root / "storymem_dist" / "assets" / "conf")
