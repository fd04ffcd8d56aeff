"""Questions and stored tokens to answers."""
