"""From records to what people look at: result files, tables, figures, HTML, TensorBoard."""
