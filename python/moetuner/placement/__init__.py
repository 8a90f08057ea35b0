"""Where experts are: slots, files, moves, index tables of a rank."""
