"""Plans as pictures: pure functions from a plan's JSON to SVG and HTML."""
