"""The configuration: every group's settings in one typed schema, composed by Hydra from ``conf/``.

``schema`` is the whole of it, ``launch`` one group, ``composing`` turns a command line into settings, ``points`` holds
the configurations of one job, ``former_names`` keeps old names of presets working. The other groups' settings live next
to the code they set.
"""
