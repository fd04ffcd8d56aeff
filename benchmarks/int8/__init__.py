"""What int8 costs in accuracy: the same questions over float16 tokens and over int8 ones."""
