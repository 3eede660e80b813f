"""From raw files to encoded rows on disk. Runs in the driver and in tasks that it starts; workers read the rows."""
