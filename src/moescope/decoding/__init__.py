"""What a state inside a model would predict: lenses and their columns."""
