"""The planner on random clusters: how long it takes, and how far from the best its placements are."""
