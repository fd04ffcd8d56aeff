"""Fine-tuning: conversations and stored tokens to new weights."""
