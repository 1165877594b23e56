"""The commands: ``storymem-render``, ``storymem-weights``, ``storymem-report``, ``storymem-doctor``, a module each.

A command turns a command line into calls, and errors into one message and an exit code; other packages do the work.
"""
