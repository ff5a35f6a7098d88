"""The studies: each measures a language model on data and writes a results folder; ``registry`` lists them."""
