"""A render job on one rank, from settings to an exit code.

Read in this order: ``job`` (the whole job), ``batch`` (claims ready shots until none is left), ``shot`` (one shot),
``clip`` (one clip). ``check`` finds mistakes before anything starts, ``inputs`` says what changes pixels, ``build``
turns settings into objects, ``prompts`` keeps prompt embeddings, ``outcome`` reports, ``identity`` names job and
machine.
"""
