"""Which shot is rendered next and by whom: planned shots, leases in the run folder, saving, and the end of a batch.

Read in this order: ``plan`` (shots and their fingerprints), ``graph`` (which shots are ready), ``leases`` and ``queue``
(claiming one), ``coordinator`` (one replica's view of the batch), ``saving`` (a rendered shot becomes a committed one),
``story_video`` (the end of a story), ``cleanup`` (what dead processes left). ``protocol`` holds the types that the
render loop and this package exchange, ``cost`` the expected work of a shot.
"""
