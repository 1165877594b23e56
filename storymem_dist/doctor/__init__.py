"""``storymem-doctor``: one page about a machine and a configuration, each line with the fix where one is needed."""
