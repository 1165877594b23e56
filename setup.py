"""What pyproject.toml cannot say: the packages are those found, plus the folders of files that go into the package.

``conf/``, ``examples/``, ``launch/`` and ``slurm/`` lie next to the package in a checkout, where people look for them,
and inside it (``storymem_dist/assets/``) once installed, where the program looks for them.
"""

from setuptools import find_packages, setup

ASSETS = ("conf", "examples", "launch", "slurm")

setup(
    packages=[*find_packages(include=["storymem_dist*"]), *(f"storymem_dist.assets.{name}" for name in ASSETS)],
    package_dir={f"storymem_dist.assets.{name}": name for name in ASSETS},
    package_data={
        "storymem_dist": ["py.typed"],
        "storymem_dist.observe.live": ["*.css", "*.js"],
        "storymem_dist.observe.report": ["*.css", "*.js"],
        "storymem_dist.planner": ["*.json"],
        "storymem_dist.weights": ["published.yaml", "packed_files/*"],
        "storymem_dist.assets.conf": ["**/*"],
        "storymem_dist.assets.examples": ["**/*"],
        "storymem_dist.assets.launch": ["**/*"],
        "storymem_dist.assets.slurm": ["*.sbatch"],
    },
)
