"""Every layer against every other: which experts could do the work of which, coarse to fine."""
