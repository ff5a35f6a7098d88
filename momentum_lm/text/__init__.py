"""From text to binarised tokens, and labelled datasets to examples."""
