"""The steps of ``benchmarks.gpu_check``: each is a function that measures one thing on a device and yields rows.

Read ``step`` first (what a step is, and its sizes), then ``machine``, ``kernels``, ``blocks``, ``residency``, ``vae``,
``programs``; ``steps`` lists them, and ``worker`` runs them in a process that may die.
"""
