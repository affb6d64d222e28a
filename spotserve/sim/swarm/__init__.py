"""The swarm: one seed draws a whole scenario (cluster, load, faults), runs it, and has strangers judge what it left."""
