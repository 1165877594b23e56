"""Manifests: valid, filled with what was set, with nothing lost on the way through YAML and Kubernetes."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from storymem_dist import errors
from storymem_dist.cli.render import run
from storymem_dist.config.launch import KubernetesSettings, LaunchSettings
from storymem_dist.config.points import Point
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.launch.kubernetes import Template, submit, to_yaml
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.resources import assets_folder
from tests.helpers.foreign_fields import JOBSET, SKYPILOT
from tests.helpers.small_job import small_point, write_storyboard

ROOT = Path(__file__).parents[3]
TEMPLATES = assets_folder("launch") / "kubernetes"
POINT = small_point("launch=kubernetes", "launch.dry_run=true", "stories.path=a", "output=runs/night")
WIDE = ParallelSettings(cfg=2, ulysses=2, across_nodes=True, device="cpu")


def point(parallel: ParallelSettings | None = None, *, output: str = "runs/night", **kubernetes: Any) -> Point:
    """A point with other settings than ``POINT``, which took a second to compose."""
    settings = POINT.settings
    launch = replace(settings.launch, kubernetes=KubernetesSettings(**kubernetes))
    changed = replace(settings, launch=launch, output=output, parallel=parallel or settings.parallel)
    return replace(POINT, settings=changed)


@pytest.fixture(autouse=True)
def not_on_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that is not on the volume of the pods, wherever the tests are started."""
    monkeypatch.chdir(tmp_path)


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Job of a manifest, as Kubernetes gets it: for a JobSet, as its controller makes it."""
    if manifest["kind"] == "Job":
        return manifest
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"], "spec": template["spec"]}


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = job_of(manifest)["spec"]["template"]["spec"]["containers"]
    return container


def validate(manifest: dict[str, Any]) -> None:
    if manifest["kind"] == "JobSet":
        jsonschema.validate(manifest, JOBSET)
    job = job_of(manifest)
    for version in ("1.31", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # as a pod failure policy needs it
    assert {rule.get("onExitCodes", {}).get("containerName", "render") for rule in rules(job)} == {"render"}


def rules(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["podFailurePolicy"]["rules"]


def filled(given: Point, *arguments: str) -> dict[str, Any]:
    template = Template.read(given.settings.launch.kubernetes, given.settings.parallel)
    manifest = template.filled([given], arguments, name="storymem-x")
    validate(manifest)
    assert yaml.safe_load(to_yaml(manifest)) == manifest
    return manifest


@pytest.mark.parametrize("name", ["job", "jobset"])
def test_a_template_is_valid_as_it_is(name: str) -> None:
    manifest = yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text())
    validate(manifest)
    pod = job_of(manifest)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] >= 600
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert container_of(manifest)["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_the_two_templates_have_the_same_pods_but_for_how_they_meet() -> None:
    job, wide = (yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text()) for name in ("job", "jobset"))
    for manifest in (job, wide):
        container = container_of(manifest)
        for key in ("args", "env"):
            del container[key]
    job["spec"]["completions"] = job["spec"]["parallelism"] = 2
    assert job_of(wide)["spec"] == job["spec"]


def test_every_exit_code_has_its_rule() -> None:
    """Mistakes are not retried, stops and losses are not counted, and the rest is retried."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StoryMemError)]
    expected = {2: "FailJob", 4: "FailJob", 3: "FailIndex", 6: "FailIndex", 75: "Ignore", 1: None, 5: None}
    assert {kind.exit_code for kind in kinds} <= set(expected), "give the new exit code its rule"
    for name in ("job", "jobset"):
        job = job_of(yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text()))
        listed = {code: rule["action"] for rule in rules(job) for code in rule.get("onExitCodes", {}).get("values", ())}
        assert {code: listed.get(code) for code in expected} == expected and set(listed) <= set(expected)
        assert rules(job)[0]["action"] == "Ignore" and "onPodConditions" in rules(job)[0]
        assert job["spec"]["backoffLimitPerIndex"] > 0


def test_the_image_has_what_the_pod_starts() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "WORKDIR /opt/storymem_dist\n" in text and "COPY launch/ launch/\n" in text and "USER 1000\n" in text
    container = container_of(yaml.safe_load((TEMPLATES / "job.yaml").read_text()))
    assert container["command"] == ["bash", "/opt/storymem_dist/launch/node.sh"]


def test_what_is_not_set_stays_as_in_the_template() -> None:
    manifest, template = filled(POINT), yaml.safe_load((TEMPLATES / "job.yaml").read_text())
    container, before = container_of(manifest), container_of(template)
    container["env"] = [one for one in container["env"] if one["name"] not in ("STORYMEM_OUTPUT", "STORYMEM_COMMAND")]
    container["args"] = before["args"]
    manifest["metadata"]["name"] = template["metadata"]["name"]
    assert manifest == template


def test_settings_fill_the_template() -> None:
    given = point(
        name="mine",
        namespace="videos",
        pods=3,
        gpus=4,
        cpus=16,
        memory="500Gi",
        shared_memory="64Gi",
        claim="shared",
        mount="/videos",
        secrets=["hub", "wandb"],
        queue="gpu",
        user=4711,
        max_retries=2,
        grace_seconds=60,
        image="registry:5000/a/b@sha256:0",
    )
    manifest = filled(given, "-m", "stories=a", "sampler.seed=1,2")
    spec, container = manifest["spec"], container_of(manifest)
    pod = spec["template"]["spec"]
    assert manifest["metadata"]["name"] == "mine" and manifest["metadata"]["namespace"] == "videos"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert (spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == (3, 3, 2)
    assert pod["terminationGracePeriodSeconds"] == 60
    assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {4711}
    assert container["resources"] == {
        "requests": {"cpu": "16", "memory": "500Gi"},
        "limits": {"memory": "500Gi", "nvidia.com/gpu": 4},
    }
    assert container["volumeMounts"][0] == {"name": "shared", "mountPath": "/videos"}
    assert pod["volumes"][0] == {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}
    assert pod["volumes"][1]["emptyDir"]["sizeLimit"] == "64Gi"
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}, {"secretRef": {"name": "wandb"}}]
    assert container["image"] == "registry:5000/a/b@sha256:0" and container["workingDir"] == "/videos"
    assert container["args"] == ["-m", "stories=a", "sampler.seed=1,2"]
    assert {"name": "STORYMEM_OUTPUT", "value": "/videos/runs/night"} in container["env"]


def test_replicas_wider_than_a_node_are_a_jobset() -> None:
    manifest = filled(point(WIDE, gpus=2, pods=6))
    replicas = manifest["spec"]["replicatedJobs"][0]
    assert (replicas["replicas"], job_of(manifest)["spec"]["completions"]) == (3, 2)
    container = container_of(manifest)
    assert container["args"] == ["launch.meet_seconds=1800"]
    names = [one["name"] for one in container["env"]]
    variables = {one["name"]: one.get("value", "") for one in container["env"]}
    assert variables["STORYMEM_NODES"] == "2"
    for name in re.findall(r"\$\((\w+)\)", variables["STORYMEM_HEAD"]):  # only what stands before it is replaced
        assert names.index(name) < names.index("STORYMEM_HEAD")
    assert container_of(filled(point(WIDE, gpus=2), "launch.meet_seconds=9"))["args"] == ["launch.meet_seconds=9"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parallel": WIDE, "gpus": 2, "pods": 3}, "3 pods with 2 ranks each hold no whole number of replicas"),
        ({"template": "jobset"}, "is for replicas over several nodes: set their layout"),
        ({"template": "jbo"}, "neither a template of this project (job, jobset) nor a file"),
        ({"template": "two.yaml"}, "cannot be read as one manifest"),
        ({"template": "pod.yaml"}, "is a Pod; it must be a Job or a JobSet"),
        ({"template": "bare.yaml"}, "needs a container named render that mounts a"),
        ({"output": "/tmp/night"}, "output=/tmp/night is not on the volume that the pods share (/work"),
        ({"output": "../night"}, "output=/night is not on the volume"),
    ],
)
def test_what_cannot_be_submitted_is_refused(given: dict[str, Any], message: str) -> None:
    Path("two.yaml").write_text("kind: Job\n---\nkind: Job\n")
    Path("pod.yaml").write_text("kind: Pod\n")
    Path("bare.yaml").write_text("kind: Job\nmetadata: {name: a}\nspec: {template: {spec: {containers: []}}}\n")
    with pytest.raises(StoryMemError) as caught:
        submit([point(**given)], [])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "My_Job"),
        ("name", "a" * 41),
        ("namespace", "-a"),
        ("claim", "a/b"),
        ("queue", "a: b"),
        ("secrets", ["ok", "a\nb"]),
        ("memory", "lots"),
        ("shared_memory", "-1Gi"),
        ("image", "a b"),
        ("mount", "work"),
        ("mount", "/"),
        ("pods", 0),
        ("user", 0),
        ("grace_seconds", 0),
    ],
)
def test_a_setting_that_kubernetes_would_refuse_is_refused_here(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"launch\.kubernetes\.{key}="):
        KubernetesSettings(**{key: value})


def as_kubernetes_reads(text: str) -> str:
    """A text after Kubernetes' replacement of ``$(NAME)`` and ``$$``; no variable has a value here."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda found: "$" if found[1] == "$" else "REPLACED", text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_no_text_is_changed_on_its_way_into_the_pod(arguments: list[str]) -> None:
    """Through YAML and the replacement of references: quotes, line breaks, numbers, truth values, ``$(HOME)``."""
    manifest = Template.read(KubernetesSettings(), ParallelSettings()).filled(
        [POINT], [*arguments, "$(HOME) $$ no 1e3"]
    )
    text = to_yaml(manifest)
    assert text.isascii()
    read = container_of(yaml.safe_load(text))["args"]
    assert [as_kubernetes_reads(one) for one in read] == [*arguments, "$(HOME) $$ no 1e3"]


@pytest.mark.parametrize("folder", ["Ünïcödé Night!", "...", "a" * 300, "2024-11-29"])
def test_a_job_is_named_after_its_run_folder_and_no_two_are_the_same(folder: str) -> None:
    given = point(output=f"runs/{folder}")
    template = Template.read(given.settings.launch.kubernetes, given.settings.parallel)
    names = {template.filled([given], ())["metadata"]["name"] for _ in range(2)}
    assert len(names) == 2
    assert all(KubernetesSettings(name=name) for name in names)


def fake_kubectl(folder: Path, answer: str, code: int = 0) -> Path:
    """A kubectl that keeps what it is given; the folder for PATH."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "kubectl"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/words\ncat > {folder}/given\n{answer}\nexit {code}\n')
    program.chmod(0o755)
    return folder / "bin"


def arguments(tmp_path: Path) -> list[str]:
    write_storyboard(tmp_path / "fox.json", [[True]])
    volume = [f"launch.kubernetes.mount={tmp_path}", "stories=fox.json", "output=runs/night"]
    return ["model=tiny", "parallel.device=cpu", "launch=kubernetes", "launch.kubernetes.gpus=0", *volume]


def test_a_dry_run_prints_the_manifest_and_the_plan_as_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was started"))
    monkeypatch.chdir(tmp_path)
    assert run([*arguments(tmp_path), "launch.dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "# 1 of 1 shots are left" in printed
    manifest = yaml.safe_load(printed)
    validate(manifest)
    assert container_of(manifest)["args"] == [
        "model=tiny",
        "parallel.device=cpu",
        "stories=fox.json",
        "output=runs/night",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_job_is_checked_and_given_to_kubectl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path)
    monkeypatch.setenv("PATH", f"{fake_kubectl(tmp_path, 'echo job.batch/x created')}{os.pathsep}{os.environ['PATH']}")
    assert run([*given[:-2], "stories=missing.json", given[-1]]) == 3  # before kubectl is called
    assert not (tmp_path / "given").exists()
    assert run(given) == 0
    assert shlex.split((tmp_path / "words").read_text()) == ["apply", "-f", "-"]
    manifest = yaml.safe_load((tmp_path / "given").read_text())
    validate(manifest)
    printed = capsys.readouterr().out
    assert "job.batch/x created" in printed and f"started job {manifest['metadata']['name']}\n" in printed
    monkeypatch.chdir("/")  # the volume is not here
    assert run([*given[:-2], "stories=missing.json", given[-1]]) == 0
    assert "storyboards and weights are checked by the pods" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ("echo 'error: no cluster' >&2", 1, "kubectl refused the job: error: no cluster"),
        ("echo 'job.batch/x unchanged'", 0, "kubectl started nothing, because there is a job of this name already"),
        (None, 0, "there is no kubectl on this machine's PATH"),
    ],
)
def test_what_kubectl_does_not_do_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, code: int, message: str
) -> None:
    monkeypatch.setenv("PATH", f"{fake_kubectl(tmp_path, answer, code)}:/bin:/usr/bin" if answer else str(tmp_path))
    with pytest.raises(ConfigError, match=re.escape(message)):
        submit([replace(POINT, settings=replace(POINT.settings, launch=LaunchSettings(mode="kubernetes")))], [])


def test_the_file_for_skypilot_has_the_fields_of_skypilot() -> None:
    task = yaml.safe_load((assets_folder("launch") / "skypilot" / "spot.yaml").read_text())
    jsonschema.validate(task, SKYPILOT)
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "node.sh" in task["run"]
