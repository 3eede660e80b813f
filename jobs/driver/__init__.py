"""What runs in the job's driver, inside the cluster: `python -m jobs.driver SPEC`."""
