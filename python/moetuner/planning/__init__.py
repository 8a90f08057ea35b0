"""From a trace to a scored placement, and placements side by side."""
