"""The analysis `swap-blocks`, and what it shares with `swap-experts`."""
