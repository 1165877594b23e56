"""Former place of ``storymem-report``: sites' copies of ``report.sbatch`` start it as a module. See ``cli.report``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("storymem_dist.cli.report", run_name="__main__")
