"""Every command of README, ``docs/`` and CONTRIBUTING is accepted by the program that it starts."""

import shlex
from pathlib import Path

import pytest

from tests.unit.docs.markdown import PAGES, Command, commands_in, commands_of
from tests.unit.docs.programs import Refused, check

COMMANDS = [command for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_the_documentation_is_accepted(command: Command) -> None:
    try:
        check(command.words)
    except Refused as refused:
        pytest.fail(f"{command}\n{refused}", pytrace=False)


@pytest.mark.parametrize("command", [
    "storymem-render sampler.steps=3",
    "storymem-render parallel=fsdp_3gpu",
    "storymem-render sampler.num_frames=82",
    "storymem-render -m sampler.num_inference_steps=20,none",
    "storymem-render -m hydra/launcher=submitit_slurm hydra.launcher.gpus=8",
    "storymem-render --config job",
    "storymem-render 'stories=[my_stories/'",
    "storymem-weights fetch t2v",
    "storymem-weights prepare weights/a weights/b --format float8",
    "storymem-report",
    "storymem-doctor --yaml",
    "storymem-doctor sampler.steps=3",
    "python -m storymem_dist.selftest --block-dim wide",
    "python -m storymem_dist.nothing",
    "python -m benchmarks.nothing",
    "python -m benchmarks.step --steps 3",
    "torchrun --ranks 2 -m storymem_dist.selftest",
    "torchrun -m storymem_dist sampler.steps=3",
    "accelerate launch --config_file launch/accelerate/no.yaml -m storymem_dist",
    "accelerate launch --config_file launch/accelerate/cpu.yaml -m storymem_dist sampler.steps=3",
    "sbatch slurm/no.sbatch stories=a",
    "sbatch slurm/render.sbatch sampler.steps=3",
    "sbatch slurm/report.sbatch runs/a runs/b runs/c",
    "bash launch/no.sh",
    "bash launch/node.sh sampler.steps=3",
    "bash .ci/run tests",
    "make tests",
    "make test PYTEST=1",
    "make test PYTEST_ARGS='tests/unit/no'",
    "pip install '.[no]'",
    "touch runs/a/stop.json",
    "docker run storymem_dist storymem-render sampler.steps=3",
    "kubectl apply -f launch/kubernetes/no.yaml",
    "kubectl get pods --selector app=storymem",
    "kubectl patch job a --patch '{\"spec\": {\"template\": 1}}'",
    "kubectl delete storymem",
    "rm -rf runs",
])  # fmt: skip
def test_a_wrong_command_is_refused(command: str) -> None:
    with pytest.raises(Refused):
        check(shlex.split(command))


def test_a_program_that_nobody_taught_is_named() -> None:
    with pytest.raises(Refused, match=r"^curl: teach this test"):
        check(["curl", "x"])


def test_commands_are_found_as_the_shell_finds_them(tmp_path: Path) -> None:
    script = "# a comment\nmake demo   # why\n\nA=1 bash x.sh 'b c' \\\n    d\n"
    assert list(commands_in(script)) == [(1, ("make", "demo")), (3, ("A=1", "bash", "x.sh", "b c", "d"))]


def test_all_pages_with_commands_are_read() -> None:
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "docs/running.md", "docs/weights.md"} <= pages
    assert sum(len(commands_of(page)) for page in PAGES) > 60
