"""What adapts fairseq to this package, and to machines without a compiler. Imported by fairseq_compat alone."""
