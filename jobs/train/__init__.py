"""The train job: conversations and stored tokens to a fine-tuned model."""
