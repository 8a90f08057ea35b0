"""Fast methods without a proof; most are baselines."""
