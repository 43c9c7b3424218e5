"""What a step takes on a machine that is not here, from its compiled program."""
