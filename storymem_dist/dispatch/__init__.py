"""Assigns shots to replicas and commits the results: plan, leases in the run folder, saving, end of the batch.

Read in this order: ``needs`` (what each shot needs of those before it), ``plan`` (shots and their fingerprints),
``story_graph`` and ``graph`` (which shots are ready), ``choosing`` (which of them is next), ``leases``, ``scanning``
and ``queue`` (claiming one), ``requests`` (what people ask of the queue), ``opening`` (start or resume),
``coordinator`` (one replica's view of the batch), ``assigning`` and ``saving`` (a claimed shot begins; a rendered one
becomes a committed one), ``story_video`` (all clips of a story in one file), ``cleanup`` (what dead processes left).
``shot_settings`` is what a shot sets over its job, ``shot_check`` and ``shot_loras`` refuse what cannot be rendered,
``ending`` waits for the end. ``protocol`` holds the types that the render loop and this package exchange, ``cost``
estimates the work of a shot. Knows nothing of ranks or models.
"""
