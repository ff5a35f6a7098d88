"""One file per question asked of a model: each takes a language model and data and streams records to a results
folder."""
