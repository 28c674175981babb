"""Several replicas of one model behind one address: routed, changed and counted as if they were one."""
