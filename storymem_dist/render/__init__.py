"""A render job on one rank, from settings to an exit code.

Read in this order: ``job`` (the whole job), ``batch`` (claims ready shots until none is left), ``shot`` (one shot),
``clip`` (one clip); ``given`` reads pictures and clips of the storyboard, ``recall`` the memory, ``loras`` those of a
shot. ``check`` finds mistakes before anything starts, ``inputs`` collects what changes pixels, ``build`` turns settings
into objects, ``attention`` and ``compilation`` choose for all ranks, ``prompts`` provides prompt embeddings,
``outcome`` reports, ``debugging`` applies the ``debug`` group, ``identity`` names job and device. Knows nothing of how
ranks are started.
"""
