import pytest

from storymem_dist.config.launch import LaunchSettings, SlurmSettings
from storymem_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "ssh"}, "launch.mode='ssh' is not allowed; use one of: inline, torchrun, slurm, kubernetes"),
        ({"processes_per_node": 0}, "launch.processes_per_node=0 is not allowed; it must be between 1 and 1024"),
        ({"max_restarts": -1}, "launch.max_restarts=-1 is not allowed"),
        ({"port": 70000}, "launch.port=70000 is not allowed; it must be between 1 and 65535"),
        ({"num_nodes": 2, "node_rank": 2}, "launch.node_rank=2 is not allowed; with launch.num_nodes=2 it is 0 to 1"),
    ],
)
def test_what_cannot_be_started_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LaunchSettings(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"time": "soon"}, "launch.slurm.time='soon' is not allowed; use minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"options": ["exclude"]}, "launch.slurm.options holds 'exclude'"),
        ({"tasks": 3}, "launch.slurm.tasks=3 goes with launch.slurm.template=render_array"),
        ({"template": "render_array", "nodes": 2}, "does not go with launch.slurm.template=render_array"),
        ({"nodes": 0}, "launch.slurm.nodes=0 is not allowed"),
    ],
)
def test_what_cannot_be_submitted_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SlurmSettings(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("time", ["30", "12:00:00", "45:00", "2-00:00:00", "1-12"])
def test_times_are_written_as_sbatch_takes_them(time: str) -> None:
    assert SlurmSettings(time=time).time == time
