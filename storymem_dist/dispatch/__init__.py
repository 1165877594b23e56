"""Which shot is rendered next, by whom: shot graph, queue of leases, planner."""
