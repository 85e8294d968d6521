"""Small helpers without any quantization in them: errors, files, optional imports, batches."""
