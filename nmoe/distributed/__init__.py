"""What ranks share: their groups and sums, symmetric memory, RDEP."""
