"""Human feedback: tasks, the pages on which people write, rank, rate and compare, and the record of their answers."""
