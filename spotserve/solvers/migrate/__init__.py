"""Migrate: what each GPU lacks, from whom it comes, in which order, and within which memory."""
