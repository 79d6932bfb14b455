"""`postcopy doctor`: what this host can do, what it lacks, and whether a guest could go to another one."""
