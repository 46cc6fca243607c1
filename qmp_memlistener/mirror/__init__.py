"""A slot backend that is kept in step with a guest, and what it said on the way."""
