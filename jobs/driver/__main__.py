"""The entry point of a job: `python -m jobs.driver SPEC [--set KEY=VALUE]`."""

from jobs.driver.main import leave, main

if __name__ == "__main__":
    leave(main())
