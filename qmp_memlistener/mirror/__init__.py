"""A slot backend that is kept in step with a guest, and its report."""
