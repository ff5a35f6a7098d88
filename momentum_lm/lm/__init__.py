"""What evaluation needs from a language model."""
