"""What a placement costs: machine, model, rows counted exactly, seconds."""
