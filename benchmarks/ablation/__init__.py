"""What local tokens with global ones are worth beside pooled features, measured on the tiny world."""
