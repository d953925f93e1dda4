"""`substitute`: experts of other layers in the place of experts that are taken out."""
