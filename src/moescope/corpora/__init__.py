"""Text in: documents to packed token batches."""
