"""All steps of the GPU check, in the order in which they run: what matters most comes first.

Numbers are those of the plan that this check follows; ``seconds`` is what a step is expected to take on one H100.
"""

from benchmarks.gpu_steps.blocks import denoise_without_waiting, time_block, time_compiled_block, time_model
from benchmarks.gpu_steps.kernels import time_attention, time_products
from benchmarks.gpu_steps.machine import describe_machine
from benchmarks.gpu_steps.programs import run_render, run_selftest
from benchmarks.gpu_steps.residency import time_offload, time_streams
from benchmarks.gpu_steps.step import Step
from benchmarks.gpu_steps.vae import decode_again, time_vae

STEPS = (
    Step(number=1, name="machine", shows="versions, memory, which kernels start", seconds=25, run=describe_machine),
    Step(number=2, name="attention", shows="every kernel on A14B's shapes", seconds=30, run=time_attention),
    Step(number=3, name="products", shows="matrix products in every format", seconds=25, run=time_products),
    Step(number=4, name="block", shows="one block: time, peak, launches", seconds=45, run=time_block),
    Step(number=8, name="stream", shows="one expert: resident, swapped, streamed", seconds=50, run=time_streams),
    Step(number=9, name="offload", shows="fsdp_offload on one rank; pinned memory", seconds=35, run=time_offload),
    Step(number=10, name="vae", shows="decode and encode in every precision", seconds=50, run=time_vae),
    Step(number=5, name="compiled block", shows="compile time, graphs", seconds=110, run=time_compiled_block),
    Step(number=6, name="model", shows="one guided step of 40 blocks", seconds=60, run=time_model),
    Step(number=7, name="no waiting", shows="no step waits for the device", seconds=8, run=denoise_without_waiting),
    Step(number=11, name="decode again", shows="a decode without memory, and its retry", seconds=12, run=decode_again),
    Step(number=12, name="selftest", shows="layouts of one rank equal one device", seconds=30, run=run_selftest),
    Step(number=13, name="render", shows="a story from the command line", seconds=30, run=run_render),
)
