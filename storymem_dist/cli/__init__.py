"""The commands: ``storymem-render``, ``storymem-weights``, ``storymem-report``, ``storymem-doctor``, a module each.

A command turns a command line into calls, errors into one message and an exit code. It knows how nothing is done.
"""
