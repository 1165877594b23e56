"""Former place of the W&B feeder, which people start by hand as a module. See ``wandb.process``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("storymem_dist.observe.wandb.process", run_name="__main__")
