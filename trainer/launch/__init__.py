"""From the command line to a job: composition, sweeps, processes."""
