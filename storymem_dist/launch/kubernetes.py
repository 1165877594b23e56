"""Submits a render to Kubernetes: a template of ``launch/kubernetes/`` with the settings of ``launch.kubernetes``.

Its pods run the same command line with ``launch=torchrun`` instead (``launch/node.sh``). Renders nothing here. Before
the job waits in a queue, settings are checked; storyboards and weights too, if the volume of the pods is here.
"""

import copy
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storymem_dist.config.launch import KubernetesSettings
from storymem_dist.config.points import Point
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.launch.again import COMMAND_VARIABLE, command_again
from storymem_dist.launch.forecast import describe, hardware_of
from storymem_dist.launch.slurm import job_arguments, num_replicas
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.check import check_job
from storymem_dist.resources import assets_folder
from storymem_dist.terminal.streams import print_line, print_lines, print_text
from storymem_dist.terminal.text import printable

TEMPLATES = ("job", "jobset")
_CONTAINER = "render"
_GPU = "nvidia.com/gpu"
_MEET_SECONDS = 1800  # images are large, and pods of a replica start one after the other
_PLAIN = re.compile(r"[A-Za-z][\w./-]+")  # every reader of YAML takes these for texts, but for words as "true"


def submit(points: Sequence[Point], arguments: Sequence[str]) -> int:
    """Start one Kubernetes job that renders ``points`` and print its name; return the exit code.

    ``arguments`` is the command line. With ``launch.dry_run`` only print its manifest, as YAML with comments. Raises
    ``StoryMemError``.
    """
    settings = points[0].settings
    for point in points:
        point.settings.stories.paths()  # raises where there are none
    template = Template.read(settings.launch.kubernetes, settings.parallel)
    manifest = template.filled(points, job_arguments(arguments))
    text = to_yaml(manifest)
    is_here = Path.cwd().is_relative_to(template.mount)
    unchecked = (
        f"the settings are right; storyboards and weights are checked by the pods, because this folder is not on "
        f"their volume ({template.mount})"
    )
    if settings.launch.dry_run:
        hardware = hardware_of(settings)
        plan = describe(points, num_replicas=num_replicas(points[0]), hardware=hardware) if is_here else unchecked
        print_lines([f"# {line}" for line in plan.splitlines()])
        if hardware is None and settings.parallel.free:
            print_line("# layout: decided when the job starts; name its devices for a plan, such as hardware=h100_80g")
        print_text(text)
        return 0
    if is_here:
        check_job(points)
    answer = _kubectl_apply(text)
    metadata = manifest["metadata"]
    kind, name = manifest["kind"].lower(), metadata["name"]
    namespace = f" --namespace {metadata['namespace']}" if "namespace" in metadata else ""
    label = "batch.kubernetes.io/job-name" if kind == "job" else "jobset.sigs.k8s.io/jobset-name"
    print_lines(
        [
            *(printable(line) for line in answer.splitlines()),
            f"started {kind} {name}{namespace}",
            *([] if is_here else [unchecked]),
            f"pods: kubectl get pods{namespace} --selector {label}={name}",
            f"logs: kubectl logs{namespace} --follow --prefix --selector {label}={name}",
            f"stop after the running step: kubectl delete {kind} {name}{namespace}",
        ]
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class Template:
    """A manifest of a Job or JobSet before it is filled in.

    ``given`` is what it came from, for messages. ``mount``: the folder at which its pods see their shared volume.
    """

    given: str
    document: dict[str, Any]
    settings: KubernetesSettings
    parallel: ParallelSettings

    @classmethod
    def read(cls, settings: KubernetesSettings, parallel: ParallelSettings) -> "Template":
        """Read the template that the settings name. Raises ``ConfigError``."""
        given = settings.template or ("jobset" if parallel.across_nodes else "job")
        path = assets_folder("launch") / "kubernetes" / f"{given}.yaml" if given in TEMPLATES else Path(given)
        try:
            document = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"launch.kubernetes.template={given!r} is neither a template of this project ({', '.join(TEMPLATES)}) "
                "nor a file"
            ) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"launch.kubernetes.template={given!r} cannot be read as one manifest: {why}") from None
        template = cls(given=given, document=document, settings=settings, parallel=parallel)
        template._require_parts()
        return template

    @property
    def mount(self) -> Path:
        """Where the pods see the volume that they share."""
        return Path(self.settings.mount or self._mount(self.document)["mountPath"])

    def filled(self, points: Sequence[Point], arguments: Sequence[str], *, name: str | None = None) -> dict[str, Any]:
        """Return the manifest of a job that renders ``points`` with the command line ``arguments``.

        ``name`` is used where the settings set none; None: made of the run folder's name, and unique. Raises
        ``ConfigError`` for an output that is not on the volume, and ``LayoutError`` for pods that hold no whole number
        of replicas.
        """
        settings, manifest = self.settings, copy.deepcopy(self.document)
        here = Path.cwd()
        folder = here if here.is_relative_to(self.mount) else self.mount
        output = self._output(points, folder)
        metadata, job, pod = manifest["metadata"], self._job(manifest), self._pod(manifest)
        container = self._container(pod)
        metadata["name"] = settings.name or name or _name_of(output)
        if settings.namespace:
            metadata["namespace"] = settings.namespace
        if settings.queue:
            metadata.setdefault("labels", {})["kueue.x-k8s.io/queue-name"] = settings.queue
        if settings.max_retries is not None:
            job["backoffLimitPerIndex"] = settings.max_retries
        if settings.grace_seconds is not None:
            pod["terminationGracePeriodSeconds"] = settings.grace_seconds
        if settings.user is not None:
            user = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), settings.user)
            pod["securityContext"] = {**pod.get("securityContext", {}), **user}
        if settings.image:
            container["image"] = settings.image
        self._fill_resources(container)
        self._fill_volumes(pod, container)
        container["workingDir"] = str(folder)
        environment = {"STORYMEM_OUTPUT": str(output), COMMAND_VARIABLE: command_again()}
        if manifest["kind"] == "JobSet":
            environment["STORYMEM_NODES"] = str(self._fill_replicas(manifest, container, points[0]))
            if not any(argument.startswith("launch.meet_seconds=") for argument in arguments):
                arguments = [*arguments, f"launch.meet_seconds={_MEET_SECONDS}"]
        elif settings.pods is not None:
            job["completions"] = job["parallelism"] = settings.pods
        container["args"] = [_without_references(argument) for argument in arguments]
        _set_environment(container, {key: _without_references(value) for key, value in environment.items()})
        for secret in settings.secrets:
            container.setdefault("envFrom", []).append({"secretRef": {"name": secret}})
        return manifest

    def _output(self, points: Sequence[Point], folder: Path) -> Path:
        """The run folder, or that of a sweep, as the pods see it."""
        given = Path(points[0].settings.output)
        output = Path(os.path.normpath(folder / (given.parent if points[0].name else given)))
        if not output.is_relative_to(self.mount) or output == self.mount:
            raise ConfigError(
                f"output={output} is not on the volume that the pods share ({self.mount}, launch.kubernetes.mount): it "
                "would be lost with them; use a folder on it, such as output=runs/night"
            )
        return output

    def _fill_resources(self, container: dict[str, Any]) -> None:
        settings = self.settings
        resources = container.setdefault("resources", {})
        requests, limits = resources.setdefault("requests", {}), resources.setdefault("limits", {})
        if settings.gpus == 0:
            limits.pop(_GPU, None)
        elif settings.gpus is not None:
            limits[_GPU] = settings.gpus
        if settings.cpus is not None:
            requests["cpu"] = str(settings.cpus)
        if settings.memory is not None:
            requests["memory"] = limits["memory"] = settings.memory

    def _fill_volumes(self, pod: dict[str, Any], container: dict[str, Any]) -> None:
        settings = self.settings
        mount = self._mount_in(container, pod)
        if settings.mount:
            mount["mountPath"] = settings.mount
        for volume in pod["volumes"]:
            if settings.claim and volume["name"] == mount["name"]:
                volume["persistentVolumeClaim"]["claimName"] = settings.claim
            if settings.shared_memory and volume.get("emptyDir", {}).get("medium") == "Memory":
                volume["emptyDir"]["sizeLimit"] = settings.shared_memory

    def _fill_replicas(self, manifest: dict[str, Any], container: dict[str, Any], point: Point) -> int:
        """Set the pods of a replica and the number of replicas; return the former."""
        parallel, launch = self.parallel, point.settings.launch
        gpus = launch.processes_per_node or container["resources"]["limits"].get(_GPU, 1)
        if parallel.free or not parallel.across_nodes:
            raise LayoutError(
                f"launch.kubernetes.template={self.given} is for replicas over several nodes: set their layout, such "
                "as parallel=two_nodes_16gpu; pods with replicas of their own are launch.kubernetes.template=job"
            )
        nodes, rest = divmod(parallel.ranks_per_replica, gpus)
        replicas = manifest["spec"]["replicatedJobs"][0]
        pods = self.settings.pods or nodes * replicas.get("replicas", 1)
        if rest or not nodes or pods % nodes:
            raise LayoutError(
                f"a replica has {parallel.ranks_per_replica} ranks, and {pods} pods with {gpus} ranks each hold no "
                "whole number of replicas; change launch.kubernetes.pods, launch.kubernetes.gpus or the layout"
            )
        job = replicas["template"]["spec"]
        job["completions"] = job["parallelism"] = nodes
        replicas["replicas"] = pods // nodes
        return int(nodes)

    # -- the parts of a manifest ---------------------------------------------------------------------------------------

    def _require_parts(self) -> None:
        try:
            kind = self.document["kind"]
            if kind not in ("Job", "JobSet"):
                raise ConfigError(
                    f"launch.kubernetes.template={self.given!r} is a {kind}; it must be a Job or a JobSet"
                )
            self.document["metadata"]["name"] = ""
            self._mount(self.document)
        except (KeyError, IndexError, TypeError, AttributeError, StopIteration):
            raise ConfigError(
                f"launch.kubernetes.template={self.given!r} needs a container named {_CONTAINER} that mounts a "
                "persistentVolumeClaim, as the templates of this project have; start from a copy of one"
            ) from None

    @staticmethod
    def _job(manifest: Mapping[str, Any]) -> dict[str, Any]:
        spec: dict[str, Any] = manifest["spec"]
        if manifest["kind"] == "JobSet":
            spec = spec["replicatedJobs"][0]["template"]["spec"]
        return spec

    def _pod(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        pod: dict[str, Any] = self._job(manifest)["template"]["spec"]
        return pod

    @staticmethod
    def _container(pod: Mapping[str, Any]) -> dict[str, Any]:
        return next(one for one in pod["containers"] if one["name"] == _CONTAINER)

    def _mount(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        pod = self._pod(manifest)
        return self._mount_in(self._container(pod), pod)

    @staticmethod
    def _mount_in(container: Mapping[str, Any], pod: Mapping[str, Any]) -> dict[str, Any]:
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        return next(mount for mount in container["volumeMounts"] if mount["name"] in claims)


def to_yaml(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as YAML that every reader takes for the same; what is not ASCII is escaped."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Quotes all texts that a reader of another version of YAML may take for a number or a truth value."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"')


_Dumper.add_representer(str, _represent_text)


def _without_references(text: str) -> str:
    """``text`` as Kubernetes must read it: it replaces ``$(NAME)`` in commands and variables, and ``$$`` by ``$``."""
    return text.replace("$", "$$")


def _set_environment(container: dict[str, Any], variables: Mapping[str, str]) -> None:
    """Set variables of a container, in their place where it has them: later ones may refer to them."""
    listed = container.setdefault("env", [])
    for name, value in variables.items():
        entry = {"name": name, "value": value}
        numbers = [number for number, one in enumerate(listed) if one["name"] == name]
        if numbers:
            listed[numbers[0]] = entry
        else:
            listed.append(entry)


def _name_of(output: Path) -> str:
    """A name for the job that no other has: a job's manifest cannot be changed, so each submission is a new job."""
    slug = re.sub(r"[^a-z0-9]+", "-", output.name.lower()).strip("-")[:20].strip("-")
    return "-".join(part for part in ("storymem", slug, secrets.token_hex(3)) if part)


def _kubectl_apply(manifest: str) -> str:
    """Give the manifest to kubectl; return what it prints. Raises ``ConfigError``."""
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "launch=kubernetes, but there is no kubectl on this machine's PATH; submit from a machine that has one and "
            "may use the cluster, or print the manifest with launch.dry_run=true"
        )
    command = ["kubectl", "apply", "-f", "-"]
    done = subprocess.run(command, input=manifest, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"kubectl refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    if re.search(r" (unchanged|configured)$", done.stdout.strip()):
        raise ConfigError(
            f"kubectl started nothing, because there is a job of this name already ({done.stdout.strip()}); delete it "
            "first, or leave out launch.kubernetes.name: then each job gets a name of its own"
        )
    return done.stdout
