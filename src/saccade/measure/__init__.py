"""Runner, timers, bytes, statistics, and the files of a run. `compare` is the door."""
