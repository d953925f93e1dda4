"""The analysis `swap-experts`."""
