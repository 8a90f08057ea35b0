"""The parts of the page, one file each: comparison in, markup out."""
