"""One run over several processes: who owns which id, how rows and gradients travel, how a job starts, fails and ends."""
