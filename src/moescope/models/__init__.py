"""Models in: load any Hugging Face MoE model and view its layers alike."""
