"""Models of Hugging Face to fairseq checkpoints and back, tensor by tensor."""
