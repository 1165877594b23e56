"""Overrides as people type them: paths as they are, and mistakes in one sentence with what was meant."""

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from storymem_dist.config.composing import compose_settings
from storymem_dist.config.names import close_to
from storymem_dist.config.overrides import prepare, quoted
from storymem_dist.config.schema import LISTS_OF_PATHS, PATHS
from storymem_dist.errors import ConfigError

NAMES = [
    "a (new) folder",
    "a,b",
    "a=b",
    "{a}",
    "[draft]",
    "50%",
    "it's",
    'the "big" one',
    "wow!",
    "#1",
    "a $b",
    "x:y",
    "~x y",
]


@given(st.text(st.sampled_from("ab\\'\"${}()[],=%!# ~\n\t"), max_size=12))
def test_quoted_text_is_read_back(text: str) -> None:
    value = OverridesParser.create().parse_override(f"key={quoted(text)}").value()
    assert OmegaConf.create({"key": value}).key == text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", [*PATHS, *LISTS_OF_PATHS, "stories"])
def test_every_path_is_taken_as_it_is_typed(key: str, name: str) -> None:
    given_name = f"folder/{name}"
    [override] = prepare([f"{key}={given_name}"])
    read, _, value = override.partition("=")
    assert OmegaConf.create({"key": OverridesParser.create().parse_override(f"key={value}").value()}).key == given_name
    assert read == ("stories.path" if key == "stories" else key)


def test_home_folders_are_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/the/home")
    settings = compose_settings(
        [f"{key}=~/x" for key in PATHS if key != "model.packed"]
        + ["stories=[~/a.json, 'b/~c.json']", "model.loras=[~/l.safetensors, {path: ~/m.safetensors}]"]
    )
    found = [settings.output, settings.model.t2v_checkpoint, settings.model.storymem_lora, settings.memory.clip_model]
    assert found == ["/the/home/x"] * 4 and settings.launch.slurm.template == "/the/home/x"
    assert settings.stories.path == ["/the/home/a.json", "b/~c.json"]
    assert [lora.path for lora in settings.model.loras] == ["/the/home/l.safetensors", "/the/home/m.safetensors"]
    with pytest.raises(ConfigError, match=r"there is no home folder ~nobody-here; write \./~nobody-here/x"):
        compose_settings(["output=~nobody-here/x"])


def test_a_comma_means_two_files_only_where_both_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").touch()
    Path("b.json").touch()
    assert compose_settings(["stories=a.json,b.json"]).stories.path == ["a.json", "b.json"]
    assert compose_settings(["stories=a.json,c.json"]).stories.path == "a.json,c.json"
    assert prepare(["-m", "stories=a.json,b.json"])[1] == "stories.path=a.json,b.json"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fps=3", "did you mean sampler.fps?"),
        ("steps=3", "did you mean sampler.num_inference_steps"),
        ("outptu=x", "did you mean output?"),
        ("+model.lora=x", "did you mean model.loras"),
        ("sampler=wan2", "did you mean wan22?"),
        ("memory=10", "or set its keys: memory.max_keyframes"),
        ("my.json", "settings are written KEY=VALUE, such as stories="),
        ("~output", "a setting cannot be removed"),
        ("sampler.num_inference_steps=1,2", "-m renders a sweep over them"),
        ("sampler.fps=a(b", "it must be a whole number"),
        ("--multi-run", "there is no such option"),
        ("stories.path=[a.json", "a list ends with ]"),
        ("model=tiny,nano", "-m renders a sweep over them"),
        ("model=choice(tiny,nanoo)", "'nanoo' is not an entry of model"),
        ("dispatch.rerender=ocean:3", "this is no list; for a list, type: 'dispatch.rerender=[ocean:3]'"),
        ("launch.slurm.options=[--exclude=node[1-3]]", "quotes around an entry with commas"),
        ("output=${nothing} (new)", "Interpolation key 'nothing' not found"),
        ("--", "there is no such option"),
    ],
)
def test_a_mistake_names_what_was_meant_and_never_hydras_syntax(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings([override])
    message = str(caught.value)
    assert said in message and override in message
    assert "To append" not in message and "use +" not in message and "\n" not in message


def test_the_advice_for_a_text_with_commas_can_be_typed() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings(["sampler.negative_prompt=blurry,dark"])
    [word] = shlex.split(str(caught.value).partition("type: ")[2])
    assert compose_settings([word]).sampler.negative_prompt == "blurry,dark"


@pytest.mark.parametrize(
    "line",
    [
        "-m model=tiny,nano",
        "-m model='tiny, nano'",
        "--multirun model=choice(tiny,nano) sampler.fps=range(8,17,8)",
        "--multi model=glob([t*,n*],exclude=nano)",
        "hydra.mode=MULTIRUN sampler.fps=8,16",
        "-sc install=bash",
        "--shell-completion query=bash",
        "--cfg job --package sampler",
        "--info searchpath",
        "--experimental-rerun config.pickle",
        "--config-dir /mine model=mine mine.key=1",
        "experiment=[demo,st_bench]",
        "hydra/launcher=submitit_slurm hydra.launcher.timeout_min=60",
    ],
)
def test_what_hydra_offers_works_as_its_manual_says(line: str) -> None:
    arguments = shlex.split(line)
    assert prepare(arguments) == arguments


@pytest.mark.parametrize("text", ["1e3", "007", "1_000", "true", "0.10", "-inf"])
def test_a_text_that_looks_like_a_number_keeps_its_digits(text: str) -> None:
    assert compose_settings([f"tracking.wandb.name={text}"]).tracking.wandb.name == text


def test_values_of_a_list_that_only_yaml_reads_keep_their_types() -> None:
    given = "model.loras=[{path: a b (c), strength: 1}, {path: d (e), strength: 0}, {path: f (g), alpha: null}]"
    loras = compose_settings([given]).model.loras
    assert [(one.path, one.strength, one.alpha) for one in loras] == [
        ("a b (c)", 1.0, None),
        ("d (e)", 0.0, None),
        ("f (g)", 1.0, None),
    ]


def test_settings_that_exist_may_be_added() -> None:
    assert compose_settings(["+model.loras=[a]", "++sampler.fps=8"]).sampler.fps == 8


def test_interpolations_and_quotes_stay_hydras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    assert compose_settings(["output=${oc.env:PLACE}/x"]).output == "/data/x"
    assert compose_settings(["output=${oc.env:PLACE}/it's (new)"]).output == "/data/it's (new)"
    assert compose_settings(["output='a, b'"]).output == "a, b"
    with pytest.raises(ConfigError, match=r"[Rr]ecursive|circle"):
        compose_settings(["output=${output}"])


@given(st.text(max_size=40))
def test_any_key_gets_an_answer(key: str) -> None:
    assert len(close_to(key)) <= 3


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    name = os.fsdecode(b"caf\xe9")
    for override in (f"output={name}", f"stories={name}/*.json", f"no{name}=1", f"--{name}"):
        with pytest.raises(ConfigError, match="not UTF-8"):
            prepare([override])
