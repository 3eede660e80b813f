"""A batch script for Slurm: Ray on an allocation, one job in it, and on again where a limit of time has cut it."""
