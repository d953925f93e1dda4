"""Changes that stay, and that `save_pretrained` saves."""
